"""The document: tables of a run, what they mean, and what they cannot show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from examples.demo.metrics import Difference
from examples.evidence.passes import RATIOS
from examples.evidence.routing import Routing
from shared_schema.statistics import even_bits_per_id

INTRODUCTION = """\
# Evidence: what routing looks like, and what replay changes

Figures of one run on the machine below, written by `make evidence`. For any other checkpoint
folder, pages like this one come from

```sh
python -m examples.evidence --model PATH --rollout-only   # any model whose routing vLLM returns
python -m examples.evidence --model PATH                  # a Qwen3-MoE: float32 and Megatron too
```

`--serve-options "--tensor-parallel-size 8"` goes to `vllm serve`.
"""
SMALL_MODEL = """\
The small model has {layers} MoE layers of {experts} experts, {top_k} chosen, and {hidden} decoder \
layers; it reads bytes and was trained for minutes on Python's standard library.

- It **can show** that mismatches arise on the same weights from nothing but arithmetic, how far \
replay takes the trainer towards its own noise, that the tools measure what they say, and which \
kinds of redundancy exist in trained routing at all.
- It **cannot show** the size of any of these in a large model. Mismatch grows with layers (more \
routers to flip) and with experts (closer calls); trained load balancing, tokens of several bytes \
and long contexts change entropy and locality; and the extreme ratios that make large runs \
collapse hardly occur in it.
"""


def write_document(
    samples_text: str,
    small: bool,
    routing: Routing,
    differences: Mapping[str, tuple[Difference, dict[float, float]]] | None,
    surroundings: Mapping[str, Any],
) -> str:
    """Return the page as Markdown."""
    layout = routing.statistics.layout
    parts = [INTRODUCTION, samples_text]
    if small:
        parts.append(
            SMALL_MODEL.format(
                layers=layout.num_moe_layers,
                experts=layout.num_experts,
                top_k=layout.top_k,
                hidden=layout.num_hidden_layers,
            )
        )
    if differences is not None:
        parts += [_mismatch(differences), _replay(differences)]
    parts += [_layers(routing), _locality(routing), _sizes(routing), _machine(surroundings)]
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _mismatch(differences: Mapping[str, tuple[Difference, dict[float, float]]]) -> str:
    rows = [
        [
            title,
            f"{found.router_mismatch:.2%}",
            f"{found.token_mismatch:.2%}",
            f"{found.logprob_abs_mean:.5f}",
            f"{found.logprob_abs_max:.3f}",
        ]
        for title, (found, _) in differences.items()
    ]
    header = ["", "router decisions", "tokens with one", "log-prob, mean", "largest"]
    return (
        "## Mismatch\n\nThe same tokens and weights in each pair; float32 alone means "
        "transformers' forward. A router decision differs if its *set* of experts does. Log-prob "
        "differences are in nats, over the sampled tokens. Other batches means micro-batches of "
        "other samples in another order: the repeat-forward noise.\n\n" + _table(header, rows)
    )


def _replay(differences: Mapping[str, tuple[Difference, dict[float, float]]]) -> str:
    rows = [
        [
            title,
            f"{found.kl_k1:+.1e}",
            f"{found.kl_k3:.1e}",
            *(f"{beyond[ratio]:.3%}" for ratio in RATIOS),
        ]
        for title, (found, beyond) in differences.items()
    ]
    header = ["", "KL, k1", "KL, k3", *(f"ratio beyond {ratio:g}" for ratio in RATIOS)]
    native, replayed, noise, noise_replayed = (
        differences[title][0].kl_k3
        for title in (
            "Megatron bf16 against vLLM bf16",
            "Megatron, rollout replayed, against vLLM",
            "Megatron against itself, other batches",
            "the same under replay",
        )
    )
    return (
        "## Replay\n\nSchulman's estimators of the KL divergence from the second to the first, and "
        "the share of sampled tokens whose importance ratio is larger, or smaller than its "
        "inverse.\n\n"
        + _table(header, rows)
        + f"\nReplay takes KL (k3) from {native:.1e} to {replayed:.1e}. The trainer's own "
        f"repeat-forward noise is {noise:.1e} with native routing, and {noise_replayed:.1e} when "
        "both passes replay the same experts; what remains above it is vLLM's other arithmetic in "
        "attention and experts, which no replay of routing can remove.\n\n"
        "![Log-prob differences and agreement of each layer](evidence_replay.png)\n"
    )


def _layers(routing: Routing) -> str:
    found, layout = routing.statistics, routing.statistics.layout
    rows = [
        [
            str(layer),
            f"{found.load_entropy[i]:.3f}",
            f"{found.imbalance[i]:.2f}",
            f"{found.bits_per_id[i]:.3f}",
            f"{found.set_bits_per_id[i]:.3f}",
            f"{found.shared_with_previous[i]:.1%}",
            f"{found.shared_by_chance[i]:.1%}",
        ]
        for i, layer in enumerate(layout.moe_layers)
    ]
    header = [
        "layer",
        "load entropy (bits)",
        "busiest / mean",
        "bits per id, ordered",
        "as a set",
        "shared with previous token",
        "by chance",
    ]
    return (
        "## Entropy and load of each layer\n\n"
        f"{found.num_rows:,} rows. With an even load the entropy would be log2 E = "
        f"{math.log2(layout.num_experts):.3f} bits, an ordered id would cost "
        f"{even_bits_per_id(layout):.3f} bits, and an id of a set log2 C(E, k) / k = "
        f"{even_bits_per_id(layout, ordered=False):.3f}. The code behind the measured bits knows "
        "each layer's load and nothing else, so it is an upper bound of the entropy. Shared: the "
        "share of a token's k experts that the token before it used too; by chance: what two "
        "tokens drawn independently under this load share.\n\n"
        + _table(header, rows)
        + "\n![Load of the experts](evidence_load.png)\n"
    )


def _locality(routing: Routing) -> str:
    chance = float(routing.statistics.shared_by_chance.mean())
    header = ["positions back", *(str(distance) for distance in routing.by_distance), "by chance"]
    row = ["experts shared", *(f"{s:.1%}" for s in routing.by_distance.values()), f"{chance:.1%}"]
    return "## Locality\n\nMean over the layers.\n\n" + _table(header, [row])


def _sizes(routing: Routing) -> str:
    raw = routing.bytes_per_token["raw"]
    rows = [
        [name, f"{size:.2f}", f"{size / raw:.3f}"] for name, size in routing.bytes_per_token.items()
    ]
    return (
        "## Compression\n\nBytes of the ids of one token, headers left out. Raw and packed are the "
        "byte format's own; zstd compresses raw ids of each sequence by itself unless it says "
        "otherwise, as they lie (by token) or transposed (by layer). The last two are what the "
        "code of the table above would take; zstd can come below it only by what tokens have in "
        "common, which that code does not see.\n\n"
        + _table(["", "bytes per token", "of raw"], rows)
    )


def _machine(surroundings: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in surroundings["versions"].items())
    hardware = surroundings["hardware"]
    return f"## Machine\n\n{versions}; {hardware['cores']} cores of {hardware['cpu']}.\n"
