"""A small MoE GPTModel for the current parallel state, and one training step of it."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from megatron_r3.reference_attention import with_reference_attention

VOCAB, SEQ, BATCH = 128, 16, 2


def tiny_config(**overrides: Any) -> TransformerConfig:
    """A TransformerConfig whose parallel sizes are those of the current parallel state."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
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
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return TransformerConfig(**(settings | overrides))


def tiny_chunks(config: TransformerConfig) -> list[GPTModel]:
    """The model chunks of this rank, one for each virtual pipeline stage."""
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(stages) if stages else [None]:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
        )
        if config.context_parallel_size > 1:
            spec = with_reference_attention(spec)
        chunks.append(
            GPTModel(
                config,
                spec,
                vocab_size=VOCAB,
                max_sequence_length=SEQ,
                pre_process=parallel_state.is_pipeline_first_stage(
                    ignore_virtual=False, vp_stage=stage
                ),
                post_process=parallel_state.is_pipeline_last_stage(
                    ignore_virtual=False, vp_stage=stage
                ),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
                vp_stage=stage,
            )
        )
    return chunks


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
