"""Build a GPTModel from a Hugging Face Qwen3-MoE checkpoint, for the current parallel state.

Made for comparisons on the CPU: Megatron's local layer spec with the reference attention, and
experts one by one (SequentialMLP). Each rank reads only its own slices of the weights: attention
and dense layers by tensor parallel rank, experts by expert and expert-tensor parallel rank, layers
by pipeline stage.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_r3.reference_attention import with_reference_attention
from shared_schema import RoutingLayout, RoutingSchemaError


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file or field, and the fix."""


def build_gpt_model(hf_path: str | Path, **overrides: Any) -> list[GPTModel]:
    """Build this rank's model chunks, one for each virtual pipeline stage, and load them.

    Args:
        hf_path: folder with ``config.json`` and safetensors files.
        overrides: fields of `TransformerConfig`; ``params_dtype`` is float32 unless given.

    Raises:
        CheckpointError: no such checkpoint, not a Qwen3-MoE model, a missing tensor.

    """
    hf_config = read_hf_config(hf_path)
    config = transformer_config(hf_config, **overrides)
    num_stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(num_stages) if num_stages else [None]:
        where = {"ignore_virtual": False, "vp_stage": stage}
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
        )
        chunk = GPTModel(
            config,
            with_reference_attention(spec),
            vocab_size=hf_config["vocab_size"],
            max_sequence_length=hf_config["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            position_embedding_type="rope",
            rotary_base=_rope_theta(hf_config),
            share_embeddings_and_output_weights=hf_config.get("tie_word_embeddings", False),
            vp_stage=stage,
        )
        # The norms come in float32 whatever params_dtype says, which Float16Module mends as here.
        chunks.append(chunk.to(config.params_dtype))
    load_weights(chunks, hf_path)
    return chunks


def read_hf_config(hf_path: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is not JSON.

    """
    path = Path(hf_path) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except OSError:
        raise CheckpointError(
            f"{path} cannot be read; pass the folder of a Hugging Face checkpoint on this machine"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from None
    return config


def transformer_config(hf_config: dict[str, Any], **overrides: Any) -> TransformerConfig:
    """Translate a Qwen3-MoE ``config.json`` for the current parallel state.

    Raises:
        CheckpointError: another architecture, a dense model, or a field that is not supported.

    """
    if hf_config.get("model_type") != "qwen3_moe":
        raise CheckpointError(
            f"config.json has model_type {hf_config.get('model_type')!r}; this loader knows "
            "'qwen3_moe' only, so convert other models with Megatron-Bridge"
        )
    for field, expected in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("use_sliding_window", False),
    ):
        if hf_config.get(field, expected) != expected:
            raise CheckpointError(
                f"config.json has {field}={hf_config[field]!r} where this loader knows "
                f"{expected!r} only; use another checkpoint"
            )
    try:
        layout = RoutingLayout.from_hf_config(hf_config)
    except RoutingSchemaError as error:
        raise CheckpointError(f"config.json describes no MoE model: {error}") from error

    dtype = overrides.get("params_dtype", torch.float32)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    if hf_config["num_key_value_heads"] % tp_size:
        raise CheckpointError(
            f"config.json has num_key_value_heads={hf_config['num_key_value_heads']} where tensor "
            f"parallelism {tp_size} needs a multiple of {tp_size}; use a smaller parallel size"
        )
    settings: dict[str, Any] = {
        "num_layers": layout.num_hidden_layers,
        "hidden_size": hf_config["hidden_size"],
        "num_attention_heads": hf_config["num_attention_heads"],
        "num_query_groups": hf_config["num_key_value_heads"],
        "kv_channels": hf_config.get("head_dim")
        or hf_config["hidden_size"] // hf_config["num_attention_heads"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config["rms_norm_eps"],
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_moe_experts": layout.num_experts,
        "moe_router_topk": layout.top_k,
        "moe_ffn_hidden_size": hf_config["moe_intermediate_size"],
        "moe_layer_freq": [int(i in layout.moe_layers) for i in range(layout.num_hidden_layers)],
        # Softmax over the chosen experts is softmax over all of them, normalised to sum 1.
        "moe_router_pre_softmax": not hf_config.get("norm_topk_prob", False),
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": tp_size,
        "sequence_parallel": tp_size > 1,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    config = TransformerConfig(**(settings | overrides))
    if config.moe_grouped_gemm:
        raise CheckpointError(
            "moe_grouped_gemm=True builds GroupedMLP experts and this loader knows SequentialMLP "
            "only; leave moe_grouped_gemm at False"
        )
    return config


def load_weights(chunks: list[GPTModel], hf_path: str | Path) -> None:
    """Copy a checkpoint's weights into this rank's chunks, each cast to its parameter's dtype.

    An optimizer that keeps float32 copies of the parameters has to be built, or told, afterwards.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is damaged.

    """
    checkpoint = _Checkpoint(Path(hf_path))
    for chunk in chunks:
        tied = chunk.share_embeddings_and_output_weights
        for name, parameter in chunk.named_parameters():
            hf_names, partition_dim = _source(_global_name(chunk, name))
            if tied and hf_names == ("lm_head.weight",):
                hf_names = ("model.embed_tokens.weight",)
            rank, size = _shard(name)
            parts = [checkpoint.read(x, partition_dim, rank, size) for x in hf_names]
            fused_qkv = name.endswith("linear_qkv.weight")
            weight = _interleave_groups(parts, chunk.config) if fused_qkv else torch.cat(parts)
            if weight.shape != parameter.shape:
                raise CheckpointError(
                    f"{' + '.join(hf_names)} in {hf_path} has the shape {tuple(weight.shape)} on "
                    f"this rank where {name} has {tuple(parameter.shape)}; config.json and the "
                    "weights belong to different models"
                )
            with torch.no_grad():
                parameter.copy_(weight)


# Megatron's parameter, by the end of its name: the tensors of the checkpoint that make it up, and
# the dimension that tensor parallelism splits in each of them.
_SOURCES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "embedding.word_embeddings.weight": (("model.embed_tokens.weight",), 0),
    "decoder.final_layernorm.weight": (("model.norm.weight",), None),
    "output_layer.weight": (("lm_head.weight",), 0),
    ".input_layernorm.weight": ((".input_layernorm.weight",), None),
    ".pre_mlp_layernorm.weight": ((".post_attention_layernorm.weight",), None),
    ".self_attention.linear_qkv.weight": (
        (".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight"),
        0,
    ),
    ".self_attention.q_layernorm.weight": ((".self_attn.q_norm.weight",), None),
    ".self_attention.k_layernorm.weight": ((".self_attn.k_norm.weight",), None),
    ".self_attention.linear_proj.weight": ((".self_attn.o_proj.weight",), 1),
    ".mlp.router.weight": ((".mlp.gate.weight",), None),
    ".linear_fc1.weight": ((".gate_proj.weight", ".up_proj.weight"), 0),
    ".linear_fc2.weight": ((".down_proj.weight",), 1),
}


def _global_name(chunk: GPTModel, name: str) -> str:
    """`name` with the checkpoint's layer and expert numbers in place of this rank's."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)(\..+)", name)
    if not match:
        return name
    layer, rest = chunk.decoder.layers[int(match[1])], match[2]
    if expert := re.fullmatch(r"\.mlp\.experts\.local_experts\.(\d+)(\..+)", rest):
        rest = f".mlp.experts.{layer.mlp.local_expert_indices[int(expert[1])]}{expert[2]}"
    return f"model.layers.{layer.layer_number - 1}{rest}"


def _source(global_name: str) -> tuple[tuple[str, ...], int | None]:
    for ending, (tensors, partition_dim) in _SOURCES.items():
        if global_name.endswith(ending):
            stem = global_name.removesuffix(ending)
            return tuple(stem + tensor for tensor in tensors), partition_dim
    raise CheckpointError(
        f"the model has the parameter {global_name}, which Qwen3-MoE checkpoints do not hold; "
        "build it with transformer_config and without options that add parameters"
    )


def _shard(name: str) -> tuple[int, int]:
    """Rank and size of the group that splits parameter `name`."""
    if ".experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def _interleave_groups(qkv: list[Tensor], config: TransformerConfig) -> Tensor:
    """Megatron's order of the fused projection: for each key/value head its queries, key, value."""
    groups = qkv[1].size(0) // config.kv_channels
    return torch.cat([x.unflatten(0, (groups, -1)) for x in qkv], dim=1).flatten(0, 1)


class _Checkpoint:
    """The safetensors files of a folder, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}  # tensor name -> open file that holds it
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file: Any = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} is no whole safetensors file ({error}); fetch it again"
                ) from error
            self.files |= dict.fromkeys(file.keys(), file)

    def read(self, name: str, dim: int | None, rank: int, size: int) -> Tensor:
        """Part `rank` of `size` equal parts along `dim`; all of the tensor when `dim` is None."""
        if name not in self.files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name} in its safetensors files; fetch the whole "
                "checkpoint"
            )
        stored = self.files[name].get_slice(name)
        if dim is None:
            return stored[:]
        length = stored.get_shape()[dim]
        if length % size:
            raise CheckpointError(
                f"{name} has {length} rows or columns where {size} ranks need a multiple of "
                f"{size}; use a smaller parallel size"
            )
        part = slice(rank * length // size, (rank + 1) * length // size)
        return stored[part] if dim == 0 else stored[:, part]


def _rope_theta(hf_config: dict[str, Any]) -> float:
    """The base of the rotary embedding; transformers 5 nests it, earlier releases do not."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"config.json asks for rope type {kind!r} where this loader knows 'default' only; "
            "use another checkpoint"
        )
    return float(rope.get("rope_theta") or hf_config["rope_theta"])
