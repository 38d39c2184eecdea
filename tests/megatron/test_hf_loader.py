import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.gloo_pool import GlooPool
from tests.megatron.tiny_qwen3_moe import VOCAB, hf_logits, save_tiny_qwen3_moe

BATCH, SEQ = 3, 16
PACK = [0, 4, 16, 24]  # each length a multiple of 4, so that context parallelism 2 divides it

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "etp2": {"expert_tensor_parallel_size": 2},
    "tp2_ep2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
}


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def zigzag(bounds: list[int], rank: int, size: int) -> Tensor:
    """Rows of the whole batch that a context parallel rank holds, in its order."""
    rows = []
    for a, b in pairwise(bounds):
        chunks = torch.arange(a, b).chunk(2 * size)
        rows += [chunks[rank], chunks[-1 - rank]] if size > 1 else [torch.arange(a, b)]
    return torch.cat(rows)


def logits_of_rank(
    path: Path, tokens: Tensor, pack: list[int] | None, overrides: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Forward `[B, S]` tokens, as one pack when `pack` bounds its sequences.

    Returns this rank's rows and their logits `[B, rows, VOCAB]`; None on earlier pipeline stages.
    """
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_r3.hf_loader import build_gpt_model

    chunks = build_gpt_model(path, **overrides)
    cp_size = parallel_state.get_context_parallel_world_size()
    cp_rank = parallel_state.get_context_parallel_rank()
    rows = zigzag(pack or [0, tokens.size(1)], cp_rank, cp_size)
    packed = None
    if pack:
        cu_seqlens, longest = torch.tensor(pack), max(b - a for a, b in pairwise(pack))
        packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, longest, longest)

    def forward_step(_: Any, chunk: Any) -> Any:
        positions = rows.expand(tokens.size(0), -1)  # unused: the rotary embedding counts itself
        output = chunk(tokens[:, rows], positions, None, packed_seq_params=packed)
        return output, lambda logits, non_loss_data: gather_from_tensor_model_parallel_region(
            logits
        )

    virtual = len(chunks) > 1
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks) if virtual else None,
        model=chunks if virtual else chunks[0],
        num_microbatches=2,
        seq_length=tokens.size(1),
        micro_batch_size=tokens.size(0),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return (rows, outputs[0].detach()) if outputs else None


def assert_float32_equal(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "logits too alike to tell models apart"
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers_in_every_layout(
    gloo_2: GlooPool, tiny_qwen3_moe: Path, layout: str, dispatcher: str
) -> None:
    tokens = random_tokens(BATCH, SEQ)
    expected = hf_logits(tiny_qwen3_moe, tokens)
    overrides = {"moe_token_dispatcher_type": dispatcher}
    ranks = gloo_2.run(logits_of_rank, tiny_qwen3_moe, tokens, None, overrides, **LAYOUTS[layout])
    seen = set()
    for rows, logits in filter(None, ranks):
        assert_float32_equal(logits, expected[:, rows])
        seen |= set(rows.tolist())
    assert seen == set(range(SEQ))


@pytest.mark.parametrize("layout", ["tp2", "pp2_vpp2", "cp2"])
def test_logits_of_a_pack_equal_those_of_its_sequences(
    gloo_2: GlooPool, tiny_qwen3_moe: Path, layout: str
) -> None:
    tokens = random_tokens(1, PACK[-1])
    expected = torch.cat([hf_logits(tiny_qwen3_moe, tokens[:, a:b]) for a, b in pairwise(PACK)], 1)
    ranks = gloo_2.run(logits_of_rank, tiny_qwen3_moe, tokens, PACK, {}, **LAYOUTS[layout])
    for rows, logits in filter(None, ranks):
        assert_float32_equal(logits, expected[:, rows])


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every_other_layer_dense": {"mlp_only_layers": [], "decoder_sparse_step": 2},
    "probabilities_not_normalised": {"norm_topk_prob": False},
    "tied_embeddings": {"tie_word_embeddings": True},
    "no_grouped_queries": {"num_key_value_heads": 4},
    "another_rope_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_option_of_the_architecture_is_followed(
    world_of_one: None, tmp_path: Path, variant: str
) -> None:
    path = save_tiny_qwen3_moe(tmp_path, **VARIANTS[variant])
    tokens = random_tokens(BATCH, SEQ)
    result = logits_of_rank(path, tokens, None, {})
    assert result
    assert_float32_equal(result[1], hf_logits(path, tokens))


def test_tied_embeddings_reach_the_last_pipeline_stage(gloo_2: GlooPool, tmp_path: Path) -> None:
    path = save_tiny_qwen3_moe(tmp_path, tie_word_embeddings=True)
    tokens = random_tokens(BATCH, SEQ)
    first, last = gloo_2.run(logits_of_rank, path, tokens, None, {}, **LAYOUTS["pp2"])
    assert first is None
    assert_float32_equal(last[1], hf_logits(path, tokens))


def edited(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with other fields in its config.json."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def test_a_config_written_by_transformers_4_is_read_alike(
    world_of_one: None, tiny_qwen3_moe: Path, tmp_path: Path
) -> None:
    older = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0}
    older |= {"num_local_experts": None, "num_experts": 8}
    tokens = random_tokens(BATCH, SEQ)
    result = logits_of_rank(edited(tiny_qwen3_moe, tmp_path, **older), tokens, None, {})
    assert result
    assert_float32_equal(result[1], hf_logits(tiny_qwen3_moe, tokens))


def test_a_bf16_model_is_near_the_float32_one(world_of_one: None, tiny_qwen3_moe: Path) -> None:
    tokens = random_tokens(BATCH, SEQ)
    result = logits_of_rank(tiny_qwen3_moe, tokens, None, {"params_dtype": torch.bfloat16})
    assert result
    assert result[1].dtype == torch.bfloat16
    expected = hf_logits(tiny_qwen3_moe, tokens)
    assert (result[1].float() - expected).abs().median() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; this loader knows 'qwen3_moe' only"),
        ({"num_local_experts": 0}, "describes no MoE model: the qwen3_moe config has num_experts"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "describes no MoE model: moe_layers is empty"),
        ({"attention_bias": True}, "attention_bias=True where this loader knows False only"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"intermediate_size": 96}, r"gate_proj.*shape \(256, 64\).* where .*\(192, 64\)"),
        ({"num_hidden_layers": 5}, r"has no tensor model\.layers\.4\."),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    world_of_one: None, tiny_qwen3_moe: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    from megatron_r3.hf_loader import CheckpointError, build_gpt_model

    with pytest.raises(CheckpointError, match=message):
        build_gpt_model(edited(tiny_qwen3_moe, tmp_path, **fields))


def test_fewer_key_value_heads_than_ranks_are_refused_by_name(
    gloo_2: GlooPool, tiny_qwen3_moe: Path, tmp_path: Path
) -> None:
    path = edited(tiny_qwen3_moe, tmp_path, num_key_value_heads=1)
    with pytest.raises(RuntimeError, match="num_key_value_heads=1 where tensor parallelism 2"):
        gloo_2.run(logits_of_rank, path, random_tokens(1, SEQ), None, {}, **LAYOUTS["tp2"])


def test_a_wrong_path_is_named(world_of_one: None, tmp_path: Path) -> None:
    from megatron_r3.hf_loader import CheckpointError, build_gpt_model

    with pytest.raises(CheckpointError, match=r"nowhere/config\.json cannot be read"):
        build_gpt_model(tmp_path / "nowhere")


def test_a_file_cut_in_half_is_named(
    world_of_one: None, tiny_qwen3_moe: Path, tmp_path: Path
) -> None:
    from megatron_r3.hf_loader import CheckpointError, build_gpt_model

    path = edited(tiny_qwen3_moe, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no whole safetensors file"):
        build_gpt_model(tmp_path)


def test_grouped_experts_are_refused_by_name(world_of_one: None, tiny_qwen3_moe: Path) -> None:
    from megatron_r3.hf_loader import CheckpointError, build_gpt_model

    with pytest.raises(CheckpointError, match="moe_grouped_gemm=True builds GroupedMLP"):
        build_gpt_model(tiny_qwen3_moe, moe_grouped_gemm=True)
