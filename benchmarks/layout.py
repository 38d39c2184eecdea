"""Bringing a batch of routes into one rank's order, and what that takes in memory.

One rank of a parallel layout takes its rows and layers out of a packed batch: plan, index-select
and transposition to `[layers, rows, k]`. Beside it run a plain copy of that many bytes (twice,
which shows the noise) and two ways that trainers write by hand, on a part of the batch: the padded
batch as dense int64, and the same in the narrow dtype, each cut by context parallelism, split,
permuted, and only then reduced to the rank's layers. Times are CPU times of the one thread.

The memory table feeds every rank of a node that holds one pipeline stage of one data-parallel
replica, all its micro-batches, from a memory-mapped batch: the peak of what they allocate.
"""

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._measure import finish, interleaved, paired_ratio, surroundings
from megatron_r3.layout_plan import LayoutPlan, Shard
from megatron_r3.local_routes import read_local_routes
from megatron_r3.scatter import scatter
from shared_schema import RoutedExpertsBatch, RoutingLayout

MIB = 1 << 20


def make_batch(layout: RoutingLayout, samples: int, tokens: int, into: Any = None) -> Any:
    """Valid routes, one row less than tokens in each sample; samples repeat a random one."""
    rng = np.random.default_rng(0)
    shape = (tokens - 1, layout.num_moe_layers, 1)
    first = rng.integers(0, layout.num_experts, shape)
    # Odd steps make the k ids distinct, E being a power of two.
    sample = (first + np.arange(layout.top_k) * 13) % layout.num_experts
    rows = samples * (tokens - 1)
    values = np.empty((rows, *sample.shape[1:]), layout.dtype) if into is None else into
    for start in range(0, rows, tokens - 1):
        values[start : start + tokens - 1] = sample
    return RoutedExpertsBatch.trusted(
        values,
        np.arange(samples + 1) * (tokens - 1),
        layout,
        np.zeros(rows, np.uint8),
        np.zeros(samples, np.int64),
        ((),) * samples,
    )


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def plain_way(
    batch: RoutedExpertsBatch, tokens: int, shard: Shard, layers: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Pad to `[B, S, L, k]`, cut, split, permute to `[L, T, k]`, take the layers."""
    values = torch.from_numpy(batch.values).view(len(batch), tokens - 1, *batch.values.shape[1:])
    dense = torch.zeros(len(batch), tokens, *values.shape[2:], dtype=dtype)
    dense[:, : tokens - 1] = values
    chunks = dense.chunk(2 * shard.cp_size, 1)
    dense = torch.cat([chunks[shard.cp_rank], chunks[-1 - shard.cp_rank]], 1)
    rows = dense.flatten(0, 1).chunk(shard.sp_size)[shard.sp_rank]
    return rows.permute(1, 0, 2).contiguous()[list(layers)]


def measure(args: argparse.Namespace, batch: RoutedExpertsBatch) -> dict[str, Any]:
    """Times of one rank, and the peak of what it allocates."""
    layout = batch.layout
    size = layout.num_moe_layers // args.pp
    layers = range(size, 2 * size) if args.pp > 1 else range(size)
    shard = Shard(args.cp, 0, args.tp, args.tp // 2)
    lengths = [args.tokens] * args.samples
    rows = LayoutPlan.packed(lengths, shard=shard).num_rows
    out = np.zeros((size, rows, layout.top_k), layout.dtype)
    theirs, copy = np.ones_like(out), np.zeros_like(out)
    starts = batch.token_starts
    assert starts is not None

    def ours(routes: RoutedExpertsBatch, into: Any) -> None:
        plan = LayoutPlan.packed([args.tokens] * len(routes), shard=shard)
        source = plan.source_rows(starts[: len(routes)], routes.lengths, routes.offsets[:-1])
        scatter(routes.values, source, layers, layout.fill_id, into)

    def with_checks() -> None:
        plan = LayoutPlan.packed(lengths, shard=shard)
        read_local_routes(batch, plan, layers, layout, out)

    part = batch.select(range(min(args.samples, args.plain_samples)))
    part_out = np.zeros((size, len(part) * args.tokens // args.cp // args.tp, layout.top_k), "u1")
    part_out = part_out.astype(layout.dtype)
    narrow = torch.from_numpy(np.empty(0, layout.dtype)).dtype
    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(batch, out),
        "checked": with_checks,
        "memcpy": lambda: np.copyto(copy, theirs),
        "memcpy again": lambda: np.copyto(copy, theirs),
        "part": lambda: ours(part, part_out),
        "int64": lambda: plain_way(part, args.tokens, shard, layers, torch.int64),
        "narrow": lambda: plain_way(part, args.tokens, shard, layers, narrow),
    }
    timed = {name: (lambda arm=arm: cpu_seconds(arm)) for name, arm in arms.items()}
    times = interleaved(timed, args.rounds, 2)
    plain = plain_way(part, args.tokens, shard, layers, narrow).numpy()
    recorded = part_out[0, :, 0] != layout.fill_id
    assert np.array_equal(part_out[:, recorded], plain[:, recorded]), "the two ways disagree"

    tracemalloc.start()
    held = np.empty_like(out)
    plan = LayoutPlan.packed(lengths, shard=shard)
    read_local_routes(batch, plan, layers, layout, held)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result: dict[str, Any] = {}
    for name, arm, other in (
        ("times_memcpy", "ours", "memcpy"),
        ("times_memcpy_checked", "checked", "memcpy"),
        ("aa_ratio", "memcpy again", "memcpy"),
        ("speedup_dense_int64", "int64", "part"),
        ("speedup_narrow", "narrow", "part"),
    ):
        result[name], result[f"{name}_interval"] = paired_ratio(times[arm], times[other])
    return {
        **result,
        "milliseconds": {name: float(np.median(seconds) * 1e3) for name, seconds in times.items()},
        "share_mib": out.nbytes / MIB,
        "peak_bytes_over_share": peak / out.nbytes,
        "device_bytes_per_id": held.itemsize,
    }


def memory_of_a_node(
    args: argparse.Namespace, file: Path, batch: RoutedExpertsBatch, pp: int, dp: int
) -> dict[str, Any]:
    """Feed each of the tp x cp ranks of one pipeline stage and replica, all its micro-batches."""
    layout = batch.layout
    assert batch.status is not None
    assert batch.token_starts is not None
    layers = range(layout.num_moe_layers // pp)
    samples = np.arange(0, len(batch), dp)
    peaks, share = [], 0
    for cp_rank, sp_rank in np.ndindex(args.cp, args.tp):
        values = np.memmap(file, layout.dtype, "r", shape=batch.values.shape)
        mine = RoutedExpertsBatch.trusted(
            values, batch.offsets, layout, batch.status, batch.token_starts, batch.spans
        )
        shard = Shard(args.cp, cp_rank, args.tp, sp_rank)
        tracemalloc.start()
        frames = []
        for micro_batch in np.array_split(samples, len(samples) // args.micro_batch_samples or 1):
            plan = LayoutPlan.packed([args.tokens] * len(micro_batch), shard=shard)
            frames.append(np.empty((len(layers), plan.num_rows, layout.top_k), layout.dtype))
            read_local_routes(mine, plan, layers, layout, frames[-1], micro_batch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        share = sum(frame.nbytes for frame in frames)
    return {
        "pp": pp,
        "dp": dp,
        "rank_share_mib": share / MIB,
        "rank_peak_mib": max(peaks) / MIB,
        "node_peak_mib": sum(peaks) / MIB,
    }


def memory_table(args: argparse.Namespace, layout: RoutingLayout) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.bin"
        rows = args.memory_samples * (args.tokens - 1)
        shape = (rows, layout.num_moe_layers, layout.top_k)
        values = np.memmap(file, layout.dtype, "w+", shape=shape)
        batch = make_batch(layout, args.memory_samples, args.tokens, values)
        values.flush()
        cells = [(1, 1), (args.pp, 1), (1, 4), (args.pp, 4)]
        return [memory_of_a_node(args, file, batch, pp, dp) for pp, dp in cells]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layout",
        description="Bringing a batch of routes into one rank's order, and what that takes.",
    )
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="of each sample")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128, help="a power of two")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tp", type=int, default=4, help="tensor-parallel ranks, with SP")
    parser.add_argument("--cp", type=int, default=2, help="context-parallel ranks")
    parser.add_argument("--pp", type=int, default=4, help="pipeline stages")
    parser.add_argument("--plain-samples", type=int, default=16, help="for the plain ways")
    parser.add_argument("--memory-samples", type=int, default=128, help="for the memory table")
    parser.add_argument("--micro-batch-samples", type=int, default=8, help="for the memory table")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layout = RoutingLayout(args.experts, args.top_k, tuple(range(args.layers)), args.layers)
    batch = make_batch(layout, args.samples, args.tokens)
    result = measure(args, batch)
    del batch
    memory = memory_table(args, layout)
    table = Table(*memory[0], title="one node of tp x cp ranks")
    for cell in memory:
        table.add_row(*(f"{value:.4g}" for value in cell.values()))
    Console().print(table)
    finish({**result, "memory": memory, **vars(args), **surroundings("moe-r3", "numpy", "torch")})


if __name__ == "__main__":
    main()
