"""Rows of prefix-cache hits whose KV blocks are filled by steps in flight and lost meanwhile."""

from pathlib import Path

import pytest

from .rigs.stepped_scheduler import SteppedScheduler

TEXT = [*range(100, 164)]


def test_a_hit_has_its_rows_though_all_who_held_the_block_were_preempted(moe_model: Path) -> None:
    stepped = SteppedScheduler(moe_model, num_blocks=7)
    for first in range(3):
        stepped.add(f"grows {first}", [first] * 32, max_tokens=3)
    stepped.add("fills", TEXT[:33], max_tokens=1)
    stepped.add("hits", TEXT[:33], max_tokens=1)
    assert len(stepped.schedule()) == 5
    assert stepped.schedule() == ["grows 0", "grows 1", "grows 2"]  # in all blocks of the others
    stepped.finish()
    assert stepped.rows["fills"] == stepped.rows["hits"] == [1] * 33


@pytest.mark.parametrize("num_tokens", [33, 40, 64])
def test_a_request_that_hits_what_a_dropped_step_computed_has_its_rows(
    moe_model: Path, num_tokens: int
) -> None:
    stepped = SteppedScheduler(moe_model, num_blocks=12)
    stepped.add("waits", [1] * 5, max_tokens=1, resumable=True)
    stepped.run()
    stepped.add("reset", TEXT[:num_tokens], max_tokens=3)
    stepped.schedule()
    with pytest.raises(RuntimeError, match="Failed to reset KV cache"):
        stepped.scheduler.reset_prefix_cache(reset_running_requests=True)
    stepped.schedule()
    stepped.add("later", TEXT, max_tokens=1)
    stepped.run()
    for name in ("reset", "later"):
        assert stepped.rows[name] == stepped.expected_rows(name)
        assert stepped.rows[name][:32] == [2] * 32


def test_rows_of_kv_that_was_never_computed_are_unrecorded(moe_model: Path) -> None:
    """VLLM caches blocks when it schedules a request, and may then preempt it in the same step."""
    stepped = SteppedScheduler(
        moe_model, num_blocks=8, scheduling_policy="priority", long_prefill_token_threshold=64
    )
    stepped.scheduler.max_num_scheduled_tokens = 64
    stepped.add("low", [*range(192)], max_tokens=1, priority=1)
    stepped.schedule()
    stepped.finish()
    stepped.scheduler.max_num_scheduled_tokens = 256
    stepped.add("high", [5] * 32, max_tokens=3, priority=0)
    stepped.schedule()
    stepped.finish()
    assert stepped.schedule() == ["high"]  # in the place of the other, which was in it already
    stepped.run()
    assert stepped.rows["low"] == stepped.expected_rows("low")
    assert [p for p, by in enumerate(stepped.rows["low"]) if by is None] == [*range(128, 160)]
