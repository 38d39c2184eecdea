"""Every private symbol of vLLM that the plugin touches is there, and is what the plugin expects."""

from pathlib import Path

import pytest
import vllm

from tools.check_vllm_sources import Sources
from vllm_r3_plugin import seam_check, seams
from vllm_r3_plugin.journal import Journal

RELEASE = seam_check.installed_release()
APPLYING = [seam for seam in seams.SEAMS if seam.applies_to(RELEASE)]


def ids(seam):
    return f"{seam.symbol}[{','.join(seam.attributes)}]"


@pytest.fixture(scope="module")
def sources():
    return Sources(Path(vllm.__file__).parents[1])


@pytest.mark.parametrize("seam", APPLYING, ids=ids)
def test_vllm_still_has(seam):
    assert seam not in seam_check.missing(), f"{seam.symbol} moved; it serves: {seam.why}"


@pytest.mark.parametrize("seam", APPLYING, ids=ids)
def test_a_check_of_the_sources_finds_what_an_import_finds(sources, seam):
    assert sources.version == RELEASE
    assert sources.problem(seam) is None


@pytest.mark.parametrize(
    ("seam", "problem"),
    [
        (("vllm.v1.request:Request.gone",), "no such symbol"),
        (("vllm.v1.no_such_module:Request",), "no such symbol"),
        (
            ("vllm.v1.request:Request", "read", "a reason", "never", ("num_tokens", "gone")),
            "no attribute gone",
        ),
        (
            ("vllm.v1.engine.async_llm:AsyncLLM.abort", "", "", "", (), ("self", "ids")),
            "takes (self, request_id, internal), expected (self, ids)",
        ),
    ],
)
def test_what_moved_is_noticed_in_the_sources_and_by_import(monkeypatch, sources, seam, problem):
    seam = seams.Seam(*seam, *("",) * max(0, 4 - len(seam)))
    assert sources.problem(seam) == problem
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, seam))
    assert seam_check.missing() == [seam]


def test_a_symbol_of_other_releases_is_not_asked_for(monkeypatch):
    later = (RELEASE[0], RELEASE[1] + 1)
    gone = seams.Seam("vllm.v1.request:Request.gone", "read", "a reason", "never", since=later)
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, gone))
    assert seam_check.missing() == []
    assert gone.applies_to(later)
    assert not gone._replace(since=(0, 0), until=RELEASE).applies_to(later)


def test_the_installed_vllm_was_checked():
    assert RELEASE in (*seams.EXECUTED_ON, *seams.READ_ON)


def test_no_symbol_is_listed_twice():
    entries = [(seam.symbol, seam.attributes) for seam in seams.SEAMS]
    assert len(set(entries)) == len(entries)


def test_a_symbol_that_moved_is_named_before_the_engine_starts(monkeypatch):
    gone = seams.Seam("vllm.v1.engine.core:EngineCore.gone", "wrapped", "a reason", "never")
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, gone))
    with pytest.raises(ValueError, match=r"no vllm\.v1\.engine\.core:EngineCore\.gone") as error:
        seam_check.require_present(Journal())
    assert "a reason" in str(error.value)


def test_on_a_release_that_was_never_run_the_plugin_warns_once_and_tries(monkeypatch, caplog):
    monkeypatch.setattr(seams, "EXECUTED_ON", ((0, 1),))
    journal = Journal()
    for _ in range(2):
        seam_check.require_present(journal)
    assert journal.counts == {"UNTESTED_VLLM": 2}
    said = f"never ran on vLLM {vllm.__version__[:4]}, only on 0.1;"
    assert sum(said in record.message for record in caplog.records) == 1
