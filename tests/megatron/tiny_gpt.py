"""A small MoE GPTModel for the current parallel state, and one training step of it."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from megatron_r3.reference_attention import with_reference_attention

VOCAB, SEQ, BATCH = 128, 16, 2


def tiny_config(**overrides: Any) -> TransformerConfig:
    """A TransformerConfig whose parallel sizes are those of the current parallel state."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "ffn_hidden_size": 128,
        "moe_ffn_hidden_size": 32,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": virtual,
        # Two stages that exchange both ways in one batch get each other's tensors under gloo.
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return TransformerConfig(**(settings | overrides))


def tiny_chunks(config: TransformerConfig, reference_attention: bool = False) -> list[GPTModel]:
    """The model chunks of this rank, one for each virtual pipeline stage.

    Packed batches and context parallelism need ``reference_attention``.
    """
    chunks = []
    for stage, ends in _stages(config):
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
        )
        if reference_attention or config.context_parallel_size > 1:
            spec = with_reference_attention(spec)
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=stage)
        chunks.append(
            GPTModel(
                config,
                spec,
                vocab_size=VOCAB,
                max_sequence_length=SEQ,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
                mtp_block_spec=mtp,
                vp_stage=stage,
                **ends,
            )
        )
    return chunks


def tiny_hybrid_chunks(config: TransformerConfig, pattern: str) -> list[Any]:
    """The same as a ``HybridModel``: ``*`` is an attention layer, ``E`` an MoE layer."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    hybrid_block.TENorm = WrappedTorchNorm  # not in a spec, and Transformer Engine needs a GPU
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=True, normalization="RMSNorm"
    ).submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )
    moe = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda
    )
    spec = ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=moe),
        ),
    )
    return [
        HybridModel(
            config,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=SEQ,
            hybrid_layer_pattern=pattern,
            position_embedding_type="rope",
            vp_stage=stage,
            **ends,
        )
        for stage, ends in _stages(config)
    ]


def _stages(config: TransformerConfig) -> Iterator[tuple[int | None, dict[str, bool]]]:
    """Each virtual stage of this rank, and whether embedding and output layer belong to it."""
    stages = config.virtual_pipeline_model_parallel_size
    for stage in range(stages) if stages else [None]:
        first, last = (
            on_end(ignore_virtual=False, vp_stage=stage)
            for on_end in (
                parallel_state.is_pipeline_first_stage,
                parallel_state.is_pipeline_last_stage,
            )
        )
        yield stage, {"pre_process": first, "post_process": last}


def train_step(chunks: list[Any], num_microbatches: int = 2) -> list[float]:
    """Forward and backward of token prediction; the losses, on the last pipeline stage only."""
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    mask = torch.triu(torch.ones(SEQ, SEQ, dtype=torch.bool), 1)[None, None]

    def forward_step(batches: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        forward = model.build_schedule_plan if return_schedule_plan else model
        losses = forward(tokens, positions, mask, labels=tokens.roll(-1, 1))

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mean = output.float().mean()
            return mean, {"loss": mean.detach().clone()}

        return losses, loss

    virtual = len(chunks) > 1
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks) if virtual else None,
        model=chunks if virtual else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=SEQ,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    return [float(report["loss"]) for report in reports]
