"""Megatron's router under replay, forward and backward, beside the native router.

Routers of several models' shapes run with random weights and inputs on the same rows, interleaved;
one native router beside another shows the noise (A/A). The routes are random and miss the last row
of each sample, as a rollout's do. Handing them over (`feed`) is once for a micro-batch and is timed
by `benchmarks.train_step`.

`forward_ratio` compares the whole router (gate, top-k, probabilities, routing map) with the sampled
agreement off. `routing_ratio_with_agreement` compares what follows the gate in a micro-batch whose
agreement with native routing is sampled. Both are medians over the shapes' medians.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_r3
from benchmarks._measure import finish, interleaved, paired_ratio, surroundings
from benchmarks._megatron import device_name, seconds, start
from shared_schema import RoutedExperts, RoutedExpertsBatch, RoutingLayout

SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"hidden_size": 4096, "num_moe_experts": 8, "moe_router_topk": 2},
    "qwen3-30b-a3b": {"hidden_size": 2048, "num_moe_experts": 128, "moe_router_topk": 8},
    "deepseek-v3": {
        "hidden_size": 7168,
        "num_moe_experts": 256,
        "moe_router_topk": 8,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        **SIGMOID,
    },
    "kimi-k2": {"hidden_size": 7168, "num_moe_experts": 384, "moe_router_topk": 8, **SIGMOID},
}
SAMPLES = 2


class OperationCount(TorchDispatchMode):
    """Counts ATen operations, views too."""

    calls: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], Any]) -> int:
    """ATen operations of one call."""
    count = OperationCount()
    with count:
        function()
    return count.calls


class Bench:
    """Routers of one shape, all with the same weights, and the same input for each."""

    def __init__(self, shape: dict[str, Any], tokens: int, device: torch.device) -> None:
        self.config = TransformerConfig(
            num_layers=1,
            num_attention_heads=1,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            add_bias_linear=False,
            params_dtype=torch.bfloat16,
            **shape,
        )
        self.device = device
        self.measure: Callable[[Callable[[], Any]], float] = lambda f: seconds(f, device)
        experts, top_k = shape["num_moe_experts"], shape["moe_router_topk"]
        self.layout = RoutingLayout(experts, top_k, (0,), 1)
        self.lengths = [tokens // SAMPLES] * SAMPLES
        self.routes = random_routes(self.layout, self.lengths)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, 1, shape["hidden_size"], generator=generator)
        self.hidden = hidden.to(device, torch.bfloat16).requires_grad_()
        self.logits = torch.randn(tokens, 1, experts, generator=generator)
        self.logits = self.logits.to(device).requires_grad_()

    def run(self, router: Any, routing_alone: bool) -> tuple[float, float]:
        """Measure a forward and its backward."""
        call, source = (router.routing, self.logits) if routing_alone else (router, self.hidden)
        forwards: list[torch.Tensor] = []
        forward = self.measure(lambda: forwards.append(call(source)[0]))
        probs = forwards.pop()
        grad = torch.ones_like(probs)
        return forward, self.measure(lambda: probs.backward(grad))

    def native_arm(self, routing_alone: bool = False) -> Callable[[], Any]:
        """Run a stock router."""
        router = self.router()
        return lambda: self.run(router, routing_alone)

    def replay_arm(self, agreement_every: int, routing_alone: bool = False) -> Callable[[], Any]:
        """Run a replaying router, in a schedule and with routes that were fed before."""
        chunk = torch.nn.ModuleList([self.router()])
        controller = megatron_r3.attach(chunk, layout=self.layout, agreement_every=agreement_every)

        def run() -> tuple[float, float]:
            with controller.schedule("replay"):
                plan = megatron_r3.LayoutPlan.packed(self.lengths)
                controller.feed(chunk, self.routes, plan=plan)
                return self.run(chunk[0], routing_alone)

        return run

    def router(self) -> TopKRouter:
        """Build a stock router; weights are the same in all of them after a seed."""
        router = TopKRouter(self.config, get_default_pg_collection()).to(self.device)
        router.set_layer_number(1)
        return router


def random_routes(layout: RoutingLayout, lengths: list[int]) -> RoutedExpertsBatch:
    """One row less than tokens for each sample."""
    rng = np.random.default_rng(0)
    samples = []
    for length in lengths:
        draws = rng.random((length - 1, layout.num_moe_layers, layout.num_experts))
        ids = draws.argpartition(layout.top_k - 1, axis=2)[:, :, : layout.top_k]
        samples.append(RoutedExperts(ids.astype(layout.dtype), layout))
    return RoutedExpertsBatch.from_list(samples)


def measure(shape: dict[str, Any], tokens: int, rounds: int, warm_up: int, device: Any) -> Any:
    """Compare the routers of one shape."""
    bench = Bench(shape, tokens, device)
    arms = {
        "native": bench.native_arm(),
        "native again": bench.native_arm(),
        "replay": bench.replay_arm(0),
        "routing": bench.native_arm(routing_alone=True),
        "routing again": bench.native_arm(routing_alone=True),
        "routing, replay": bench.replay_arm(0, routing_alone=True),
        "routing, agreement": bench.replay_arm(1, routing_alone=True),
    }
    times = interleaved(arms, rounds, warm_up)
    forward = {name: taken[:, 0] for name, taken in times.items()}
    both = {name: taken.sum(1) for name, taken in times.items()}
    result: dict[str, Any] = {"native_forward_ms": 1e3 * float(np.median(forward["native"]))}
    for name, ours, theirs in (
        ("forward_ratio", forward["replay"], forward["native"]),
        ("aa_ratio", forward["native again"], forward["native"]),
        ("forward_backward_ratio", both["replay"], both["native"]),
        ("routing_ratio", forward["routing, replay"], forward["routing"]),
        ("routing_ratio_with_agreement", forward["routing, agreement"], forward["routing"]),
        ("routing_aa_ratio", forward["routing again"], forward["routing"]),
    ):
        result[name], result[f"{name}_interval"] = paired_ratio(ours, theirs)
    bench.measure = operations
    counts = {name: sum(arm()) for name, arm in arms.items() if name.startswith("routing")}
    result["extra_ops"] = counts["routing, replay"] - counts["routing"]
    result["extra_ops_with_agreement"] = counts["routing, agreement"] - counts["routing"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay_router",
        description="Megatron's router under replay, forward and backward, beside the native one.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, help="default: 512 on a CPU, 16384 on a GPU")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them")
    args = parser.parse_args()
    device = start(args.device)
    tokens = args.tokens or (16384 if device.type == "cuda" else 512)
    shapes = {}
    for name in args.shapes:
        shapes[name] = measure(SHAPES[name], tokens, args.rounds, args.warm_up, device)
        print(f"{name}: {shapes[name]['forward_ratio']:.3f} of the native forward")
    over_shapes = {
        key: float(np.median([shape[key] for shape in shapes.values()]))
        for key in ("forward_ratio", "aa_ratio", "routing_ratio_with_agreement")
    }
    finish(
        {
            **over_shapes,
            "extra_ops": max(shape["extra_ops"] for shape in shapes.values()),
            "shapes": shapes,
            "tokens": tokens,
            "rounds": args.rounds,
            "device": device_name(device),
            **surroundings("moe-r3", "megatron-core", "torch", "numpy"),
        }
    )


if __name__ == "__main__":
    main()
