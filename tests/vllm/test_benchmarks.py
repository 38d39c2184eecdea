"""The benchmarks run, and say what their targets are read from."""

import json
import subprocess
import sys
from typing import Any

from .rigs.engine_process import engine_environment


def closing_line(name: str, arguments: str) -> dict[str, Any]:
    """Run a benchmark; its last line."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
    finished = subprocess.run(command, capture_output=True, text=True, env=engine_environment())
    assert finished.returncode == 0, finished.stderr[-8000:]
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    assert {"versions", "hardware"} <= set(result)
    return result


def test_store_step_compares_both_paths_and_calls_nothing_for_each_request() -> None:
    result = closing_line(
        "store_step", "--requests 32 512 --layers 2 --rounds 1 --warm-up 0 --prefills 1"
    )
    few, many = (result["by_requests"][count] for count in ("32", "512"))
    for figures in (few, many, result):
        assert {"ms_per_step", "native_ms_per_step", "speedup", "interval"} <= set(figures)
        assert {"ms_per_step", "native_ms_per_step", "speedup"} <= set(figures["prefill"])
        assert figures["lookups_per_request"] == 0
        assert figures["lookups_per_request_of_a_new_batch"] == 1
    assert few["writes_per_step"] == 1 / 16  # steps wait for each other
    # No call for a request, and 24 at most for the page of 16 rows that it fills now and then.
    assert many["calls_per_step"] - few["calls_per_step"] < (512 - 32) / 16 * 24


def test_capture_throughput_has_figures_for_each_setting() -> None:
    result = closing_line(
        "capture_throughput",
        "--hidden-size 128 --layers 2 --rounds 1 --warm-up 0 --concurrency 2 4 --turns 2 "
        "--prompt-tokens 8 --output-tokens 4",
    )
    keys = {"ratio_on_off", "interval", "aa_ratio", "aa_interval", "hook_cpu_share"}
    assert keys <= set(result)
    settings = [(s["concurrency"], s["turns"]) for s in result["by_setting"]]
    assert settings == [(2, 1), (4, 1), (2, 2)]
    assert all(keys <= set(setting) for setting in result["by_setting"])
    assert result["hook_cpu_share"] > 0


def test_finish_burst_fetches_the_rows_of_requests_that_end_together() -> None:
    result = closing_line(
        "finish_burst", "--requests 2 --tokens 256 --others 1 --layers 2 --arms fetch"
    )
    assert {"p99_ratio", "loop_stall_ms", "arms"} <= set(result)
    assert result["arms"]["fetch"]["mbytes"] > 256 * 2 * 8 * 7 / 8 / 1e6  # 7 bits an id


def test_soak_holds_nothing_of_requests_that_ended() -> None:
    result = closing_line("soak", "--requests 400 --parts 4 --concurrency 32 --kv-blocks 40")
    assert {"rss_bytes_per_request", "objects_per_request", "ms_slope_per_request"} <= set(result)
    assert result["returned"] > 100
    assert result["aborted"] > 0
    assert result["preempted"] > 0
    assert not [event for event in result["counted"] if event.startswith("error")]
    assert max(result["held"].values()) < 256
