"""Tiny random models whose MoE layers lie, route and count their experts in different ways."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tiny_models import COMMON, Shape, save_tokenizer


@dataclass(frozen=True)
class TinyLayout:
    """A model: its Hugging Face classes, by the common part of their names, and its settings."""

    family: str
    shape: Shape
    settings: dict[str, Any]
    # Wide enough that two correct float32 forwards rarely disagree, and no sigmoid is saturated.
    gate_std: float = 0.5
    bias_std: float = 0.05
    # What `LLM` is started with besides.
    engine: dict[str, Any] = field(default_factory=dict)


_MOE = {"moe_intermediate_size": 32, "norm_topk_prob": True}
_BIASED = {
    **_MOE,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}

# For families that know no head_dim: CPU attention needs one of 32 or more.
_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}

LAYOUTS = {
    "every second layer of 256 experts": TinyLayout(
        "Qwen3Moe",
        Shape(4, (1, 3), 256, 8),
        {**_MOE, "num_experts": 256, "num_experts_per_tok": 8, "decoder_sparse_step": 2},
    ),
    "300 experts": TinyLayout(
        "Qwen3Moe",
        Shape(2, (0, 1), 300, 4),
        {**_MOE, "num_experts": 300, "num_experts_per_tok": 4},
    ),
    "dense first, shared expert, sigmoid and bias": TinyLayout(
        "Glm4Moe",
        Shape(3, (1, 2), 32, 4),
        {**_BIASED, "n_group": 1, "topk_group": 1},
        gate_std=0.15,
    ),
    "groups of experts": TinyLayout(
        "Dots1",
        Shape(3, (1, 2), 32, 4),
        {**_BIASED, "n_group": 4, "topk_group": 2},
        gate_std=0.15,
    ),
    "latent attention, groups of experts": TinyLayout(
        "DeepseekV3",
        Shape(3, (1, 2), 32, 4),
        {
            **_BIASED,
            "n_group": 4,
            "topk_group": 2,
            # From the published config; vLLM reads both, transformers assumes them.
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            # With the next the only size of latent attention that vLLM's CPU kernel is built for.
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
        gate_std=0.15,
        engine={
            # vLLM would prefer a bfloat16 kernel on CPUs with AMX.
            "attention_backend": "CPU_MLA",
            # vLLM 0.32's CPU kernel takes the stride between heads for that between tokens in the
            # views that latent attention hands it, and so rotates other elements: router inputs
            # are then off by 1e-2 and 1 decision in 100 differs; computed in torch, by 1e-6.
            "compilation_config": {"custom_ops": ["-rotary_embedding"]},
        },
    ),
    "shared expert behind a gate": TinyLayout(
        "Qwen2Moe",
        Shape(3, (0, 1, 2), 16, 4),
        {
            **_TWO_HEADS,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "two of eight experts": TinyLayout(
        "Mixtral",
        Shape(2, (0, 1), 8, 2),
        {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "softmax before the choice": TinyLayout(
        "Olmoe",
        Shape(2, (0, 1), 16, 4),
        {**_TWO_HEADS, "num_experts": 16, "num_experts_per_tok": 4},
    ),
    "scaled residuals": TinyLayout(
        "GraniteMoe",
        Shape(2, (0, 1), 16, 4),
        {
            **_TWO_HEADS,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
        },
    ),
    "dense first, two shared experts": TinyLayout(
        "Ernie4_5_Moe",
        Shape(3, (1, 2), 16, 4),
        {
            **_TWO_HEADS,
            "moe_num_experts": 16,
            "moe_k": 4,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 2,
        },
        # vLLM 0.32's CPU router chooses by softmax alone where experts have no groups.
        bias_std=0.0,
    ),
    "biased gate, sliding windows": TinyLayout(
        "GptOss",
        Shape(4, (0, 1, 2, 3), 16, 4),
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "sliding_window": 32,
            "head_dim": 64,
        },
        engine={"enable_prefix_caching": False},
    ),
    "one expert, every second layer": TinyLayout(
        "Llama4",
        Shape(4, (1, 3), 16, 1),
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
        },
        engine={"enable_prefix_caching": False},
    ),
}


def make_layout(layout: TinyLayout, path: Path) -> Path:
    """Write a float32 model of that layout."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = "Text" if layout.family == "Llama4" else ""
    config_class: Callable[..., Any] = getattr(transformers, f"{layout.family}{text}Config")
    model_class = getattr(transformers, f"{layout.family}ForCausalLM")
    config = config_class(
        **{**COMMON, "num_hidden_layers": layout.shape.num_layers, **layout.settings}
    )
    model = model_class(config).float()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(tensor, std=layout.gate_std)
        elif name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(tensor, std=layout.bias_std)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path
