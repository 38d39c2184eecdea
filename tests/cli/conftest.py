"""Files to look at, and `r3` in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from shared_schema import RoutedExperts, RoutingLayout, RowStatus, Span, encode
from shared_schema.cli import main
from tests.schema.strategies import distinct_ids

LAYOUT = RoutingLayout(num_experts=16, top_k=4, moe_layers=(1, 2, 3), num_hidden_layers=4)
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


class Done(NamedTuple):
    """What a run of `r3` left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def r3(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Done:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        return Done(status, *capsys.readouterr())

    return run


def sample(seed: int = 0, rows: int = 40) -> RoutedExperts:
    return RoutedExperts(distinct_ids(np.random.default_rng(seed), rows, LAYOUT), LAYOUT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`whole.safetensors`, `gaps.safetensors` with unrecorded rows and two spans, `config.json`."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    whole = sample()
    status = np.zeros(40, np.uint8)
    status[5:8] = RowStatus.STEP_LOST
    status[11] = RowStatus.EVICTED
    spans = (Span(3, 13, weight_version="7"), Span(13, 43, weight_version="8"))
    gaps = RoutedExperts(whole.ids, LAYOUT, 3, status, spans)
    (tmp_path / "whole.safetensors").write_bytes(encode(whole))
    (tmp_path / "gaps.safetensors").write_bytes(encode(gaps))
    return tmp_path
