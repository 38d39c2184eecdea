"""Outputs whose rows are read by another thread, with vLLM's own messages."""

import queue

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from shared_schema import RowStatus
from vllm_r3_plugin.in_flight import rows_of
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.late_outputs import LateOutputs
from vllm_r3_plugin.row_reader import RowReader

from .rigs.page_stores import LAYOUT, feed, make_store, rows_for

NAMES = ("long", "other", "longer")


class Step:
    """Two requests that end, and whose rows are put off, beside one that goes on."""

    def __init__(self):
        self.store, self.reader, self.journal = make_store(), RowReader(), Journal()
        self.late = LateOutputs(self.reader, self.journal)
        self.accounts = []
        for tag, name in enumerate(NAMES, 1):
            self.store.admit(name, 0, [])
            feed(self.store, (name, tag, 0, 9))
        for name in ("long", "longer"):
            rows = self.store.freeze(name, 2, 9)
            self.late.put_off(name, self.store, rows, self.accounts.append)
        outputs = [
            EngineCoreOutput(n, [5], finish_reason=None if n == "other" else FinishReason.STOP)
            for n in NAMES
        ]
        self.outputs = {3: EngineCoreOutputs(outputs=outputs, finished_requests={"long", "longer"})}

    def check_rows(self, output):
        ids, status = rows_of(output.routed_experts, LAYOUT)
        assert not status.any()
        tag = NAMES.index(output.request_id) + 1
        np.testing.assert_array_equal(ids, rows_for(tag, range(2, 9)))


def test_the_others_leave_at_once_and_each_put_off_output_in_a_message_of_its_own():
    step, sent = Step(), queue.Queue()
    step.late.send(step.outputs, sent)
    assert [output.request_id for output in step.outputs[3].outputs] == ["other"]
    assert step.outputs[3].finished_requests == {"long", "longer"}
    for name in ("long", "longer"):
        client, message = sent.get(timeout=60)
        assert client == 3
        assert [output.request_id for output in message.outputs] == [name]
        assert message.finished_requests is None
        assert message.timestamp == step.outputs[3].timestamp
        step.check_rows(message.outputs[0])


def test_rows_are_accounted_for_and_pages_given_back_in_the_engines_thread():
    step, sent = Step(), queue.Queue()
    step.late.send(step.outputs, sent)
    assert "long" in step.late
    for name in NAMES:
        step.store.release(name)
    step.reader.shutdown()
    assert step.accounts == []
    assert step.store.num_pages == 6
    step.reader.release()
    assert "long" not in step.late
    assert [status.tolist() for status in step.accounts] == [[0] * 7] * 2
    assert step.store.num_pages == 0


def test_without_a_queue_the_rows_are_there_at_once():
    step = Step()
    step.late.send(step.outputs, None)
    assert [output.request_id for output in step.outputs[3].outputs] == list(NAMES)
    for output in step.outputs[3].outputs[::2]:
        step.check_rows(output)
    assert len(step.accounts) == 2


@pytest.mark.parametrize("where", ["submit", "read"])
def test_an_exception_costs_the_rows_but_no_output(where, monkeypatch):
    step, sent = Step(), queue.Queue()

    def fails(*args):
        raise RuntimeError("fails on demand")

    target = step.reader if where == "submit" else step.store
    monkeypatch.setattr(target, "submit" if where == "submit" else "read_frozen", fails)
    step.late.send(step.outputs, sent)
    step.reader.shutdown()
    arrived = [o for _ in range(sent.qsize()) for o in sent.get_nowait()[1].outputs]
    arrived += step.outputs[3].outputs
    assert sorted(output.request_id for output in arrived) == sorted(NAMES)
    assert all(output.routed_experts is None for output in arrived)
    assert any("RuntimeError" in event for event in step.journal.counts)
    step.reader.release()
    for name in NAMES:
        assert name not in step.late
        step.store.release(name)
    assert step.store.num_pages == 0


def test_a_request_given_up_between_its_end_and_the_sending_keeps_its_pages_from_others():
    step, sent = Step(), queue.Queue()
    step.store.repair(["long"])
    step.store.admit("new", 0, [])
    feed(step.store, ("new", 9, 0, 40))
    step.late.send(step.outputs, sent)
    step.check_rows(sent.get(timeout=60)[1].outputs[0])
    assert step.store.read("new", 0, 1)[1][0] == RowStatus.RECORDED
