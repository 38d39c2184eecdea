"""A core attention for Megatron in plain torch: padded, packed and context-parallel batches.

Megatron's own local attention knows neither packing nor context parallelism, and those that do
need a GPU. This one runs anywhere, with gradients, and is written to be read, not to be fast: it
holds a mask over all pairs of rows of the batch.

Shapes: S rows of a padded batch on this rank, T rows of a packed one, B batch, N query heads,
G key/value heads, D head size.
"""

import copy
import itertools
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def with_reference_attention(spec: Any) -> Any:
    """Return a copy of a GPT layer or block spec whose layers use `ReferenceAttention`.

    `spec` is what `get_gpt_layer_local_spec` or `get_gpt_decoder_block_spec` returns.
    """
    spec = copy.deepcopy(spec)
    for layer in [spec] if isinstance(spec, ModuleSpec) else spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = ReferenceAttention
    return spec


class ReferenceAttention(MegatronModule):
    """Causal attention over each sequence, with the call signature of `DotProductAttention`.

    With context parallelism each rank holds two chunks of every sequence, in the zigzag order of
    Megatron: of 2 * CP equal chunks rank r has chunk r, then chunk 2 * CP - 1 - r.

    Raises:
        ValueError: the configuration asks for what this attention does not do.

    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for name, value, expected in (
            ("attention_dropout", dropout, 0.0),
            ("window_size", config.window_size, None),
            ("softmax_type", config.softmax_type, "vanilla"),
            ("apply_query_key_layer_scaling", config.apply_query_key_layer_scaling, False),
            ("attention_type", attention_type, "self"),
        ):
            if value != expected:
                raise ValueError(
                    f"ReferenceAttention does not support {name}={value!r}; set it to {expected!r}"
                )
        self.softmax_scale = softmax_scale
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each sequence to the same and to earlier positions.

        Args:
            query: `[S, B, N, D]`, or packed `[T, N, D]`.
            key: `[S, B, G, D]`, or packed `[T, G, D]`; N is a multiple of G.
            value: as `key`.
            attention_mask: bool, broadcast to `[B, N, S, S]`, True where a row may not attend; on
                top of causality. None for packed and for context-parallel batches.
            attn_mask_type: ignored, the attention is causal.
            attention_bias: None.
            packed_seq_params: the sequences of a packed batch; with ``cu_seqlens_q_padded`` the
                padding at a sequence's end attends like more of its tokens.

        Returns:
            `[S, B, N * D]`, or packed `[T, N * D]`.

        Raises:
            ValueError: an argument that is not supported, or a sequence that 2 * CP does not
                divide.

        """
        cp_group = self.pg_collection.cp
        if attention_bias is not None:
            raise ValueError("ReferenceAttention does not support attention_bias; pass None")
        if attention_mask is not None and (packed_seq_params or cp_group.size() > 1):
            raise ValueError(
                f"ReferenceAttention got an attention_mask of shape {tuple(attention_mask.shape)} "
                "with a packed or context-parallel batch, which is causal by itself; pass None"
            )
        if packed_seq_params:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            bounds = packed_seq_params.cu_seqlens_q_padded
            bounds = (packed_seq_params.cu_seqlens_q if bounds is None else bounds).tolist()
        else:
            bounds = [0, query.size(0) * cp_group.size()]

        rows = [_rows_of_rank(bounds, cp_group.size(), rank) for rank in range(cp_group.size())]
        segment, position = rows[cp_group.rank()]
        if segment.numel() != query.size(0):
            raise ValueError(
                f"the rank holds {query.size(0)} rows where the sequence bounds {bounds} over "
                f"CP {cp_group.size()} give {segment.numel()}; pass the cu_seqlens of this batch"
            )
        key_segment, key_position = torch.cat(rows, dim=1)
        allowed = (segment[:, None] == key_segment) & (position[:, None] >= key_position)
        if attention_mask is not None:
            allowed = allowed & ~attention_mask

        if cp_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=cp_group)
                for x in (key, value)
            )
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=allowed.to(query.device),
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        context = context.permute(2, 0, 1, 3).flatten(start_dim=2)
        return context.squeeze(1) if packed_seq_params else context


def _rows_of_rank(bounds: list[int], cp_size: int, rank: int) -> Tensor:
    """The rows of a CP rank, int64 `[2, R]`: the sequence of each and its position in it."""
    rows = []
    for segment, length in enumerate(b - a for a, b in itertools.pairwise(bounds)):
        if cp_size == 1:
            position = torch.arange(length)
        elif length % (2 * cp_size):
            raise ValueError(
                f"sequence {segment} has {length} rows where CP {cp_size} needs a multiple of "
                f"{2 * cp_size}; pad it and pass cu_seqlens_q_padded"
            )
        else:
            chunks = torch.arange(length).chunk(2 * cp_size)
            position = torch.cat([chunks[rank], chunks[-1 - rank]])
        rows.append(torch.stack([torch.full_like(position, segment), position]))
    return torch.cat(rows, dim=1)
