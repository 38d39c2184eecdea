"""The demo's client: what it makes of an answer, and of its own files."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.demo import DemoError
from examples.demo.rollout import load, save, to_sample
from shared_schema import RoutingLayout, RowStatus

LAYOUT = RoutingLayout(num_experts=8, top_k=2, moe_layers=(1, 2), num_hidden_layers=3)


def _choice(rows: int = 4) -> dict[str, Any]:
    """A choice of vLLM's completions answer: three prompt tokens, two sampled ones."""
    native = np.zeros((rows, 3, 2), np.uint8)
    native[:, 1:] = [3, 1]
    file = io.BytesIO()
    np.save(file, native)
    return {
        "prompt_token_ids": [5, 6, 7],
        "token_ids": [8, 9],
        "logprobs": {"token_logprobs": [-0.5, -1.25]},
        "routed_experts": base64.b64encode(file.getvalue()).decode(),
    }


def test_an_answer_becomes_tokens_logprobs_and_one_row_for_each_token_but_the_last():
    sample = to_sample(_choice(), LAYOUT)
    assert sample.token_ids == [5, 6, 7, 8, 9]
    assert sample.logprobs.tolist() == [-0.5, -1.25]
    assert sample.routed.ids.tolist() == [[[3, 1], [3, 1]]] * 4
    assert sample.routed.is_complete


def test_an_answer_without_routed_experts_counts_as_missing_rows():
    sample = to_sample(_choice() | {"routed_experts": None}, LAYOUT)
    assert sample.routed.status is not None
    assert sample.routed.status.tolist() == [RowStatus.MISSING] * 4


def test_a_wrong_number_of_rows_is_an_error():
    with pytest.raises(DemoError, match=r"5 rows .* 3 prompt and 2 output tokens, expected 4"):
        to_sample(_choice(rows=5), LAYOUT)


def test_a_saved_rollout_is_read_back_alike_and_replaces_an_older_one(tmp_path: Path):
    save([to_sample(_choice(), LAYOUT)] * 3, tmp_path)
    saved = to_sample(_choice() | {"token_ids": [1, 2]}, LAYOUT)
    save([saved], tmp_path)
    (read,) = load(tmp_path, LAYOUT)
    assert read.token_ids == saved.token_ids
    assert read.logprobs.tolist() == saved.logprobs.tolist()
    assert read.routed == saved.routed
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["000.safetensors"]
