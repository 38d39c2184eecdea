"""Tiny random multimodal models whose language model has experts, with their processors."""

from pathlib import Path
from typing import Any

from .tiny_models import COMMON, NUM_EXPERTS, TOP_K, Shape, save_tokenizer, widen_gates

IMAGE_TOKEN, IMAGE_TOKEN_ID = "<unused0>", 259
IMAGE_TOKENS = 16
ARIA = Shape(2, (0, 1), NUM_EXPERTS, TOP_K)
# The only one that its processor knows without an option for each call.
ARIA_IMAGE_SIZE, _ARIA_PATCH_SIZE = 980, 98


def make_aria(path: Path) -> Path:
    """Write a float32 Aria, whose layers all route."""
    from transformers import AriaConfig, AriaForConditionalGeneration, AutoTokenizer
    from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
    from transformers.models.aria.processing_aria import AriaProcessor

    settings: dict[str, Any] = {**COMMON, "num_hidden_layers": ARIA.num_layers}
    config = AriaConfig(
        text_config={
            **settings,
            "model_type": "aria_text",
            "moe_num_experts": ARIA.num_experts,
            "moe_topk": ARIA.top_k,
            "moe_num_shared_experts": 1,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": ARIA_IMAGE_SIZE,
            "patch_size": _ARIA_PATCH_SIZE,
        },
        projector_patch_to_query_dict={(ARIA_IMAGE_SIZE // _ARIA_PATCH_SIZE) ** 2: IMAGE_TOKENS},
        image_token_index=IMAGE_TOKEN_ID,
    )
    _write(AriaForConditionalGeneration, config, path)
    tokenizer = AutoTokenizer.from_pretrained(
        path, extra_special_tokens={"image_token": IMAGE_TOKEN}
    )
    AriaProcessor(
        image_processor=AriaImageProcessorPil(max_image_size=ARIA_IMAGE_SIZE),
        tokenizer=tokenizer,
        size_conversion={ARIA_IMAGE_SIZE: IMAGE_TOKENS},
    ).save_pretrained(path)
    return path


def _write(model_class: Any, config: Any, path: Path) -> Path:
    import torch

    torch.manual_seed(0)
    model = model_class(config).float()
    widen_gates(model)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path
