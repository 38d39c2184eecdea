"""A session whose turn ends within a speculative step: vLLM goes on behind tokens that it cut."""

from pathlib import Path

import pytest

from .rigs.engine import NGRAM_SPECULATION
from .rigs.stepped_scheduler import SteppedScheduler


def _session(model: Path, sampled: list[int], *, queued: bool) -> SteppedScheduler:
    """Two turns; the first ends with its third token, `sampled` has the second and those behind."""
    stepped = SteppedScheduler(model, num_blocks=12, speculative_config=NGRAM_SPECULATION)
    stepped.add("session", [1] * 6, max_tokens=3, resumable=True)
    if queued:
        stepped.add("session", [2] * 40, max_tokens=3, resumable=True)
    stepped.schedule()
    stepped.finish()
    stepped.draft("session", [7, 7, 7])
    stepped.schedule()
    stepped.finish({"session": sampled})
    if not queued:
        stepped.add("session", [2] * 40, max_tokens=3, resumable=True)
    stepped.run()
    return stepped


@pytest.mark.parametrize("queued", [False, True])
def test_a_turn_that_ends_with_a_step_goes_on_with_its_rows(moe_model: Path, queued: bool) -> None:
    stepped = _session(moe_model, [7, 7], queued=queued)
    assert stepped.rows["session"] == [1] * 6 + [2] * 2 + [3] * 40 + [4, 5]


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("num_cut", [1, 2])
def test_no_row_is_returned_for_what_follows_tokens_that_were_cut(
    moe_model: Path, queued: bool, num_cut: int
) -> None:
    stepped = _session(moe_model, [7] * (2 + num_cut), queued=queued)
    assert stepped.scheduler.r3_journal.counts["SESSION_SHIFTED"] == 1
    assert stepped.rows["session"][:8] == [1] * 6 + [2] * 2
    assert set(stepped.rows["session"][8:]) == {None}
