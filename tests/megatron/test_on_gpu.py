"""What only a CUDA GPU can show; on one, run this file by itself: `pytest -m gpu`."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible here"),
]

SHAPE = {"hidden_size": 2048, "num_moe_experts": 128, "moe_router_topk": 8}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@pytest.fixture(scope="module")
def gpu() -> Iterator[torch.device]:
    from megatron.core import parallel_state

    from benchmarks._megatron import start

    yield start("cuda")
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


class Routers:
    """Replaying routers of a model's shape, and one micro-batch for them."""

    def __init__(self, device: torch.device, tokens: int, layers: int, **attach: Any) -> None:
        import megatron_r3
        from benchmarks.replay_router import Bench, random_routes
        from shared_schema import RoutingLayout

        bench = Bench(SHAPE, tokens, device)
        self.chunk = torch.nn.ModuleList([bench.router() for _ in range(layers)])
        for number, router in enumerate(self.chunk, 1):
            router.set_layer_number(number)
        self.layout = RoutingLayout(128, 8, tuple(range(layers)), layers)
        self.controller = megatron_r3.attach(self.chunk, layout=self.layout, **attach)
        self.plan = megatron_r3.LayoutPlan.packed([tokens // 2, tokens // 2])
        self.routes = random_routes(self.layout, [tokens // 2, tokens // 2])
        self.hidden = bench.hidden

    def feed(self) -> None:
        self.controller.feed(self.chunk, self.routes, plan=self.plan)

    def forward_backward(self) -> None:
        for router in self.chunk:
            router(self.hidden)[0].sum().backward()


@pytest.mark.parametrize("agreement_every", [0, 1])
def test_feed_and_routers_never_wait_for_the_device(
    gpu: torch.device, agreement_every: int
) -> None:
    routers = Routers(gpu, 4096, 2, agreement_every=agreement_every)
    with routers.controller.schedule("replay"):
        routers.feed()
        routers.forward_backward()  # allocations and loading of kernels may wait
        with torch.profiler.profile() as profile:
            torch.cuda.set_sync_debug_mode("error")
            try:
                routers.feed()
                routers.forward_backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    names = {event.key for event in profile.key_averages()}
    # The profiler itself waits once when it stops.
    calls = {event.key: event.count for event in profile.key_averages() if event.key in WAITS}
    assert sum(calls.values()) <= 1, calls
    assert any("Memcpy HtoD (Pinned" in name for name in names), names


def test_routes_travel_behind_the_compute_that_runs(gpu: torch.device) -> None:
    from megatron_r3.host_buffer import _copy_stream

    routers = Routers(gpu, 16384, 48)
    matrix = torch.randn(8192, 8192, device=gpu, dtype=torch.bfloat16)
    started, computed, copied = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    with routers.controller.schedule("replay"):
        routers.feed()
        routers.forward_backward()
        torch.cuda.synchronize()
        started.record()
        for _ in range(400):
            matrix @ matrix
        computed.record()
        routers.feed()
        copied.record(_copy_stream(gpu))
        assert not computed.query(), "the compute ended before feed did: make it longer"
        routers.forward_backward()
        torch.cuda.synchronize()
    assert started.elapsed_time(copied) < started.elapsed_time(computed)


def test_ids_lie_on_the_device_in_their_wire_dtype(gpu: torch.device) -> None:
    routers = Routers(gpu, 16384, 48)
    with routers.controller.schedule("replay"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(gpu)
        routers.feed()
        ids = 48 * 16384 * 8
        assert torch.cuda.memory_allocated(gpu) - before < 1.05 * ids
        routers.forward_backward()


def test_a_captured_router_follows_each_micro_batch_that_is_fed(gpu: torch.device) -> None:
    from tests.megatron.foreign_routes import expected_map, foreign_routes

    routers = Routers(gpu, 512, 1, graph_rows=512)
    router, hidden = routers.chunk[0], routers.hidden.detach()
    with torch.no_grad():
        native = router(hidden)[1].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            router(hidden)  # warm-up
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            routed = router(hidden)[1]
        for first in (0, 2):
            routes = foreign_routes(routers.layout, (256, 256), first)
            with routers.controller.schedule("replay"):
                routers.controller.feed(routers.chunk, routes, plan=routers.plan)
                graph.replay()
            cells = [
                (first + row // 256, row % 256) if row % 256 < 255 else None for row in range(512)
            ]
            expected, replayed = expected_map(routers.layout, cells, layer=0)
            assert torch.equal(routed.cpu()[replayed], expected[replayed])
            assert torch.equal(routed.cpu()[~replayed], native.cpu()[~replayed])


def on(device: torch.device, batches: Sequence[Any]) -> list[Any]:
    return [replace(batch, tokens=batch.tokens.to(device)) for batch in batches]


@pytest.mark.parametrize("checkpoint", ["none", "full", "block", "selective", "torch", "reentrant"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_recomputes_find_their_frames_by_sequence_numbers(
    gpu: torch.device, checkpoint: str, order: Sequence[int]
) -> None:
    """Backward runs in a thread of its own there, forward in this one."""
    import megatron_r3
    from tests.megatron.foreign_routes import RouterWitness, expected_map, foreign_routes
    from tests.megatron.micro_batches import forward_backward, padded_micro_batches
    from tests.megatron.test_foreign_routes import checkpoint_layers
    from tests.megatron.test_own_record import RECOMPUTE
    from tests.megatron.tiny_gpt import tiny_chunks, tiny_config

    own = checkpoint in ("torch", "reentrant")
    settings = {"use_cpu_initialization": False, "masked_softmax_fusion": False}
    [model] = tiny_chunks(tiny_config(**settings, **({} if own else RECOMPUTE[checkpoint])))
    model.to(gpu)
    if own:
        checkpoint_layers(model, checkpoint == "reentrant")
    batches = on(gpu, padded_micro_batches())
    controller, witness = megatron_r3.attach(model), RouterWitness().watch(model)

    def before_forward(number: int, batch: Any) -> None:
        witness.micro_batch = number
        routes = foreign_routes(controller.layout, batch.lengths, 10 * number)
        controller.feed(model, routes, host_lengths=batch.lengths, seq_length=batch.width)

    def before_backward(number: int) -> None:
        witness.micro_batch = number

    with torch.device(gpu), controller.schedule("replay"):
        forward_backward(model, batches, before_forward, before_backward, order)
    assert len(witness.forwards) == 3 * len(batches)
    assert bool(witness.recomputes) == (checkpoint != "none")
    for calls in (witness.forwards, witness.recomputes):
        for (number, layer), used in calls.items():
            lengths = batches[number].lengths
            cells = [
                (10 * number + cell[0], cell[1])
                if cell is not None and cell[1] < lengths[cell[0]] - 1
                else None
                for cell in batches[number].cells()
            ]
            expected, replayed = expected_map(controller.layout, cells, layer)
            assert torch.equal(used.cpu()[replayed], expected[replayed])


@pytest.mark.parametrize("name", ["replay_router", "train_step", "layout"])
def test_the_benchmark_runs_at_its_real_size(name: str) -> None:
    """Prints the figures for docs/benchmarks.md."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    print(json.dumps(result, indent=1))
    assert np.isfinite(result["aa_ratio"])
