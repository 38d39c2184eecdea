"""What the capture takes from routers that see other ranks' rows, or part of a step at a time."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from vllm.forward_context import (
    BatchDescriptor,
    DPMetadata,
    ForwardContext,
    override_forward_context,
)
from vllm.v1.worker import ubatching

from shared_schema import RoutingLayout
from vllm_r3_plugin.capturer import LayerCapture, RoutingCapturer
from vllm_r3_plugin.forward_layout import ForwardLayout
from vllm_r3_plugin.journal import Journal

MAX_TOKENS, TOP_K = 64, 2


class Rig:
    """The callback of one router on data-parallel rank `rank`."""

    def __init__(self, rank: int, tp_size: int = 1, in_parts: bool = False) -> None:
        self.journal = Journal()
        layout = RoutingLayout(64, TOP_K, (0,), 1)
        forward_layout = ForwardLayout(rank, tp_size, self.journal)
        device = torch.device("cpu")
        self.capturer = RoutingCapturer(layout, MAX_TOKENS, device, forward_layout, in_parts)
        self.captures: list[LayerCapture] = []
        self.capturer.bind([type("Source", (), {"layer": 0, "attach": self.captures.append})()])

    def route(self, context: ForwardContext, ids: np.ndarray) -> None:
        with override_forward_context(context):
            self.captures[0](torch.from_numpy(ids))

    def taken(self, num_tokens: int) -> tuple[np.ndarray, list[int]]:
        ids = self.capturer.copy_rows(num_tokens).wait()
        return ids[:, 0], self.capturer.unreported_layers(ids)


def context_of(num_tokens: list[int] | None, **settings) -> ForwardContext:
    dp = None if num_tokens is None else DPMetadata(torch.tensor(num_tokens, dtype=torch.int32))
    return ForwardContext({}, {}, {}, dp_metadata=dp, **settings)


def some_ids(num_rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((num_rows, 64)), axis=-1)[:, :TOP_K]


def test_rows_of_other_ranks_are_left_out():
    rig, ids = Rig(rank=1), some_ids(12)
    rig.capturer.arm(3)
    rig.route(context_of([5, 4, 3]), ids)
    rows, unreported = rig.taken(3)
    assert unreported == []
    assert (rows == ids[5:8]).all()


@pytest.mark.parametrize("num_rows", [0, 3, 6, 20, 100])
def test_a_batch_of_unknown_layout_is_an_unrecorded_step_and_one_warning(num_rows, caplog):
    rig = Rig(rank=0, tp_size=2)
    with caplog.at_level("WARNING", logger="vllm.moe_r3"):
        for _ in range(3):
            rig.capturer.arm(4)
            rig.route(context_of([4, 4]), some_ids(4))
            rig.capturer.arm(4)
            rig.route(context_of([4, 4]), some_ids(num_rows))
            assert rig.taken(4)[1] == [0]
    assert sum("routed" in record.message for record in caplog.records) == 1
    assert rig.journal.counts["UNKNOWN_ROW_LAYOUT"] == 3


def test_without_data_parallelism_the_batch_is_the_step_and_its_padding():
    rig, ids = Rig(rank=0, tp_size=2), some_ids(8)
    rig.capturer.arm(5)
    rig.route(context_of(None, batch_descriptor=BatchDescriptor(7)), ids)
    rows, unreported = rig.taken(5)
    assert unreported == []
    assert (rows == ids[:5]).all()


@contextmanager
def micro_batches(contexts: list[ForwardContext]):
    """vLLM's own micro-batch contexts; yields a function that runs as one of them."""
    ubatches = ubatching.make_ubatch_contexts(
        len(contexts), object(), object(), contexts, threading.Barrier(1)
    )
    ubatching._CURRENT_CONTEXTS[:] = ubatches
    thread = threading.get_ident()

    def run_as(number: int) -> None:
        ubatching._THREAD_ID_TO_CONTEXT[thread] = number

    try:
        yield run_as
    finally:
        ubatching._CURRENT_CONTEXTS.clear()
        ubatching._THREAD_ID_TO_CONTEXT.clear()


@pytest.mark.parametrize("sizes", [[4, 4], [4, 5], [3, 3, 5]])
def test_each_micro_batch_writes_behind_those_before_it(sizes):
    rig, num_tokens = Rig(rank=1, in_parts=True), sum(sizes) - 1
    contexts = [context_of([n, n]) for n in sizes]
    parts = [some_ids(n, seed) for seed, n in enumerate(sizes)]
    with micro_batches(contexts) as run_as:
        for step in range(2):
            rig.capturer.arm(num_tokens)
            for number, (context, ids) in enumerate(zip(contexts, parts, strict=True)):
                run_as(number)
                rig.route(context, ids)
                if step:
                    ubatching._CURRENT_CONTEXTS[number] = None  # it has run its last layer
        rows, unreported = rig.taken(num_tokens)
    assert unreported == []
    assert (rows == np.concatenate(parts)[:num_tokens]).all()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_micro_batch_that_did_not_report_is_noticed(missing):
    rig, contexts = Rig(rank=0, in_parts=True), [context_of([4, 4]) for _ in range(2)]
    with micro_batches(contexts) as run_as:
        rig.capturer.arm(8)
        run_as(1 - missing)
        rig.route(contexts[1 - missing], some_ids(4))
        assert rig.taken(8)[1] == [0]
