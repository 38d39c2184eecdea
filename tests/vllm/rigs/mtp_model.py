"""A tiny random GLM-4-MoE with a layer behind the others that predicts one more token."""

import json
from pathlib import Path
from typing import Any

from .tiny_models import Shape

SHAPE = Shape(num_layers=3, moe_layers=(1, 2), num_experts=32, top_k=4)
MTP_LAYER = SHAPE.num_layers
_LETTERS = 4


def make_mtp(path: Path) -> Path:
    """Write a float32 model whose last layer in the checkpoint is that of the predictor.

    Head and predictor's head name few tokens and agree often, so that drafts are accepted.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from .tiny_layouts import LAYOUTS, TinyLayout, make_layout

    plain = LAYOUTS["dense first, shared expert, sigmoid and bias"]
    deeper = Shape(MTP_LAYER + 1, (*SHAPE.moe_layers, MTP_LAYER), SHAPE.num_experts, SHAPE.top_k)
    make_layout(TinyLayout(plain.family, deeper, plain.settings, plain.gate_std), path)
    weights: dict[str, Any] = load_file(path / "model.safetensors")
    head = weights["lm_head.weight"]
    torch.nn.init.normal_(head, std=0.5)
    head[_LETTERS:] = 0
    hidden_size = head.shape[1]
    own = f"model.layers.{MTP_LAYER}."
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{own}{norm}.weight"] = torch.ones(hidden_size)
    weights[f"{own}eh_proj.weight"] = torch.cat([torch.eye(hidden_size)] * 2, dim=1)
    weights[f"{own}shared_head.head.weight"] = head.clone()
    weights[f"{own}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": SHAPE.num_layers, "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path
