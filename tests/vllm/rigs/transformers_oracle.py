"""The routing that transformers computes in float32 on the same weights, compared as sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .rollouts import Rollout

# Two correct float32 forwards differ by about 1e-5 in router logits of standard deviation 4.
# Experts closer than this to the top-k border are a tie that either may win.
TIE = 1e-4
_BATCH = 64


@dataclass(frozen=True)
class Agreement:
    """How many router decisions (one token in one layer) were compared, and how many were wrong."""

    decisions: int
    differing: int
    ties: int

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            self.decisions + other.decisions,
            self.differing + other.differing,
            self.ties + other.ties,
        )


def compare_sets(ids: np.ndarray, logits: np.ndarray) -> Agreement:
    """Compare `ids` [T, L, k] with the top-k of `logits` [T, L, E], as sets.

    A decision differs when its ids are not k distinct experts, or when an expert it left out beats
    one that it took by more than TIE.
    """
    top_k, num_experts = ids.shape[-1], logits.shape[-1]
    in_range = ids < num_experts
    taken = np.zeros(logits.shape, bool)
    np.put_along_axis(taken, np.where(in_range, ids, 0).astype(np.int64), True, axis=-1)
    lowest_taken = np.where(taken, logits, np.inf).min(-1)
    highest_left = np.where(taken, -np.inf, logits).max(-1)
    differs = (taken.sum(-1) != top_k) | ~in_range.all(-1) | (highest_left > lowest_taken + TIE)
    ordered = np.sort(logits, axis=-1)
    ties = ordered[..., -top_k] - ordered[..., -top_k - 1] <= TIE
    return Agreement(differs.size, int(differs.sum()), int(ties.sum()))


class TransformersOracle:
    """Hugging Face's own forward of the checkpoint at `path`, in float32."""

    def __init__(self, path: Path) -> None:
        import torch
        import transformers

        self._torch = torch
        (name,) = transformers.AutoConfig.from_pretrained(path).architectures
        model_class = getattr(transformers, name)
        self._model = model_class.from_pretrained(path, dtype=torch.float32).eval()
        self._scores: list[Any] = []
        for module in self._model.modules():
            if type(module).__name__.lower().endswith("router"):
                module.register_forward_hook(self._note_scores)

    def _note_scores(self, router: Any, _: Any, outputs: Any) -> None:
        """Keep what the router chose its top-k of; Llama 4 returns its logits last."""
        logits = [t for t in outputs if t.shape[-1] == router.num_experts][-1]
        bias = getattr(router, "e_score_correction_bias", None)
        # With neither bias nor groups the sigmoid keeps the order, and would only blur it.
        if bias is not None and (bias.any() or router.num_group > 1):
            logits = logits.sigmoid() + bias
            if router.num_group > 1:
                grouped = logits.unflatten(-1, (router.num_group, -1))
                group_scores = grouped.topk(2, dim=-1)[0].sum(-1)
                chosen = group_scores.topk(router.topk_group, dim=-1)[1]
                left_out = self._torch.ones_like(group_scores).scatter(-1, chosen, 0).bool()
                logits = grouped.masked_fill(left_out[..., None], -np.inf).flatten(-2)
        self._scores.append(logits)

    def router_logits(self, sequences: Sequence[Sequence[int]], **inputs: Any) -> list[np.ndarray]:
        """Scores [T, L_moe, E] whose top-k each router takes, for each sequence of T token ids.

        Sequences are padded on the right, which a causal model does not see. Further `inputs` of
        the model belong to all of them.
        """
        torch = self._torch
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(by_length), _BATCH):
            batch = by_length[start : start + _BATCH]
            width = len(sequences[batch[-1]])
            padded = [list(sequences[i]) + [0] * (width - len(sequences[i])) for i in batch]
            self._scores.clear()
            with torch.no_grad():
                self._model.model(input_ids=torch.tensor(padded), **inputs)
            logits = torch.stack([s.view(len(batch), width, -1) for s in self._scores], dim=2)
            for row, i in zip(logits.numpy(), batch, strict=True):
                found[i] = row[: len(sequences[i])]
        return [found[i] for i in range(len(sequences))]

    def agreement(self, rollouts: Sequence[Rollout], **inputs: Any) -> Agreement:
        """Compare the routed experts of every rollout, whole sequence."""
        logits = self.router_logits([r.tokens[:-1] for r in rollouts], **inputs)
        return sum(
            (
                compare_sets(rollout.moe_ids(), rows[rollout.prompt_start :])
                for rollout, rows in zip(rollouts, logits, strict=True)
            ),
            Agreement(0, 0, 0),
        )

    def router_logits_behind(
        self, old: "TransformersOracle", prefix: Sequence[int], tokens: Sequence[int]
    ) -> np.ndarray:
        """Router logits [T, L_moe, E] of T `tokens` behind a prefix whose KV `old` computed."""
        torch = self._torch
        with torch.no_grad():
            cache = old._model.model(input_ids=torch.tensor([prefix]), use_cache=True)
            layers = self._model.model(
                input_ids=torch.tensor([tokens]),
                past_key_values=cache.past_key_values,
                output_router_logits=True,
            ).router_logits
        return torch.stack([layer.view(len(tokens), -1) for layer in layers], dim=1).numpy()
