import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.gloo_pool import GlooPool

HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def attention(cp_size: int = 1) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_r3.reference_attention import ReferenceAttention
    from tests.megatron.tiny_gpt import tiny_config

    return ReferenceAttention(
        tiny_config(context_parallel_size=cp_size), 1, AttnMaskType.causal, "self"
    )


def packed(bounds: list[int], real: list[int] | None = None) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens = torch.tensor(real or bounds, dtype=torch.int32)
    padded = torch.tensor(bounds, dtype=torch.int32) if real else None
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=tokens,
        cu_seqlens_kv=tokens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def random_qkv(*leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the output."""
    g = torch.Generator().manual_seed(3)
    shapes = [(*leading, n, HEAD_DIM) for n in (HEADS, GROUPS, GROUPS)]
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    return q, k, v, torch.randn(*leading, HEADS * HEAD_DIM, generator=g)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence written out: `[S, heads, D]` to `[S, N * D]`."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("snd,tnd->nst", q, k) / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return torch.einsum("nst,tnd->snd", scores.softmax(-1), v).flatten(1)


def with_gradients(function: Any, qkv: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def dense_packed(bounds: list[int]) -> Any:
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return lambda q, k, v: torch.cat([dense(q[s], k[s], v[s]) for s in spans])


def dense_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([dense(q[:, b], k[:, b], v[:, b]) for b in range(q.size(1))], dim=1)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_a_padded_batch_attends_causally(world_of_one: None) -> None:
    *qkv, grad = random_qkv(13, 3)
    core = attention()
    assert_same(
        with_gradients(lambda q, k, v: core(q, k, v, None), qkv, grad),
        with_gradients(dense_batch, qkv, grad),
    )


def test_it_equals_megatrons_own_local_attention(world_of_one: None) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from tests.megatron.tiny_gpt import tiny_config

    config = tiny_config(kv_channels=HEAD_DIM)
    stock = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    core = attention()
    *qkv, grad = random_qkv(13, 3)
    future = torch.ones(13, 13).triu(1).bool()[None, None]
    for mask in (future, future | (torch.arange(13) == 5)):
        assert_same(
            with_gradients(lambda q, k, v, m=mask: core(q, k, v, m), qkv, grad),
            with_gradients(lambda q, k, v, m=mask: stock(q, k, v, m), qkv, grad),
        )


@pytest.mark.parametrize("bounds", [[0, 7], [0, 1, 6, 20]])
def test_packed_sequences_do_not_see_each_other(world_of_one: None, bounds: list[int]) -> None:
    *qkv, grad = random_qkv(bounds[-1])
    core, psp = attention(), packed(bounds)
    assert_same(
        with_gradients(lambda q, k, v: core(q, k, v, None, packed_seq_params=psp), qkv, grad),
        with_gradients(dense_packed(bounds), qkv, grad),
    )


def test_padding_inside_a_pack_leaves_real_rows_alone(world_of_one: None) -> None:
    bounds, lengths = [0, 8, 16], [5, 8]
    *qkv, _ = random_qkv(bounds[-1])
    core = attention()
    out = core(*qkv, None, packed_seq_params=packed(bounds, real=[0, 5, 13]))
    for start, length in zip(bounds, lengths, strict=False):
        span = slice(start, start + length)
        torch.testing.assert_close(out[span], dense(*(x[span] for x in qkv)))


def zigzag(bounds: list[int], rank: int) -> Tensor:
    """Rows of the whole batch that CP rank `rank` of 2 holds, in its order."""
    rows = []
    for a, b in itertools.pairwise(bounds):
        quarter = (b - a) // 4
        quarters = [list(range(a + i * quarter, a + (i + 1) * quarter)) for i in range(4)]
        rows += quarters[rank] + quarters[3 - rank]
    return torch.tensor(rows)


def run_context_parallel(bounds: list[int], batch: int | None) -> list[Tensor]:
    """This rank's rows of the output and of the gradients."""
    from megatron.core import parallel_state

    rank = parallel_state.get_context_parallel_rank()
    rows = zigzag(bounds, rank)
    *qkv, grad = random_qkv(bounds[-1], *([batch] if batch else []))
    psp = None if batch else packed(bounds)
    core = attention(cp_size=2)
    return with_gradients(
        lambda q, k, v: core(q, k, v, None, packed_seq_params=psp),
        tuple(x[rows] for x in qkv),
        grad[rows],
    )


@pytest.mark.parametrize(("bounds", "batch"), [([0, 16], 3), ([0, 4, 16, 24], None)])
def test_context_parallel_ranks_together_equal_one_process(
    gloo_2: GlooPool, bounds: list[int], batch: int | None
) -> None:
    *qkv, grad = random_qkv(bounds[-1], *([batch] if batch else []))
    whole = with_gradients(dense_batch if batch else dense_packed(bounds), qkv, grad)
    ranks = gloo_2.run(run_context_parallel, bounds, batch, context_parallel_size=2)
    for rank, parts in enumerate(ranks):
        assert_same(parts, [x[zigzag(bounds, rank)] for x in whole])


def run_indivisible() -> None:
    run_context_parallel([0, 4, 10], None)


def test_a_sequence_that_cp_does_not_divide_is_named(gloo_2: GlooPool) -> None:
    with pytest.raises(RuntimeError, match="sequence 1 has 6 rows where CP 2"):
        gloo_2.run(run_indivisible, context_parallel_size=2)


def test_rows_that_do_not_match_the_bounds_are_named(world_of_one: None) -> None:
    *qkv, _ = random_qkv(9)
    with pytest.raises(ValueError, match=r"holds 9 rows where the sequence bounds \[0, 7\]"):
        attention()(*qkv, None, packed_seq_params=packed([0, 7]))


def test_what_it_does_not_do_is_refused_by_name(world_of_one: None) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_r3.reference_attention import ReferenceAttention
    from tests.megatron.tiny_gpt import tiny_config

    with pytest.raises(ValueError, match=r"not support attention_dropout=0\.1"):
        ReferenceAttention(tiny_config(attention_dropout=0.1), 1, AttnMaskType.causal, "self")


def test_a_patched_spec_leaves_the_stock_one_alone(world_of_one: None) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )

    from megatron_r3.reference_attention import ReferenceAttention, with_reference_attention
    from tests.megatron.tiny_gpt import tiny_config

    def core(layer: Any) -> Any:
        return layer.submodules.self_attention.submodules.core_attention

    layer = get_gpt_layer_local_spec(num_experts=4)
    block = get_gpt_decoder_block_spec(tiny_config(), use_transformer_engine=False)
    assert core(with_reference_attention(layer)) is ReferenceAttention
    patched = with_reference_attention(block)
    assert [core(x) for x in patched.layer_specs] == [ReferenceAttention] * 4
    assert core(layer) is not ReferenceAttention
    assert all(core(x) is not ReferenceAttention for x in block.layer_specs)
