"""Memory for routing is what the formula says, and the formula is said at start-up."""

from dataclasses import replace

import pytest
import torch

from shared_schema import RoutingLayout
from vllm_r3_plugin.capturer import RoutingCapturer
from vllm_r3_plugin.memory import MemoryBounds
from vllm_r3_plugin.scheduler import RoutingScheduler, _build_store

QWEN3_30B = RoutingLayout(128, 8, tuple(range(48)), 48)


def bounds(layout=QWEN3_30B, max_bytes=None):
    return MemoryBounds(layout, 8192, 16, 1_000_000, 256, 32_768, max_bytes)


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (256, 1), (512, 10)])
def test_the_device_holds_the_rows_of_one_step_twice(num_experts, top_k):
    layout = RoutingLayout(num_experts, top_k, (1, 2, 3), 4)
    capturer = RoutingCapturer(layout, 8192, torch.device("cpu"))
    aside = capturer.copy_rows(8192).wait()
    assert capturer._buffer.nbytes + aside.nbytes == bounds(layout).device_nbytes


def test_the_host_holds_what_the_kv_cache_holds_and_the_requests_that_run():
    assert bounds().host_nbytes == (1_000_000 + 256 * 32_768) * 48 * 8


def test_a_limit_is_kept_to_whole_pages():
    limited = bounds(max_bytes=10_000_000)
    assert 0 <= 10_000_000 - limited.host_nbytes < 16 * 48 * 8


def test_the_formula_is_said_with_its_numbers():
    assert str(bounds()) == (
        "routing takes 6,291,456 bytes on each worker's device (2 x 8,192 tokens of a step x 48 "
        "MoE layers x 8 experts) and at most 3,605,225,472 bytes of host memory in the engine "
        "core, touched only where used (1,000,000 tokens of the KV cache and 256 requests of "
        "32,768 tokens, 384 bytes each)"
    )
    assert str(bounds(max_bytes=10_000_000)).endswith("touched only where used (max_bytes)")


def test_a_store_for_which_there_is_no_memory_is_refused_in_one_sentence():
    scheduler = object.__new__(RoutingScheduler)
    scheduler._r3_kv_blocks = None
    too_large = replace(bounds(), cached_tokens=1 << 50)
    with pytest.raises(MemoryError, match=r"refuses host memory .* expected up to .* max_bytes"):
        _build_store(scheduler, too_large)
