"""Random LoRA adapters in PEFT's layout, and the same weights merged into the model."""

import json
from pathlib import Path

RANK = 8
SCALE = 2.0


def make_adapter(path: Path, model: Path, seed: int, targets: tuple[str, ...]) -> tuple[Path, Path]:
    """Write an adapter of `model` and the merged model; returns both folders.

    Args:
        path: folder that holds both.
        model: a transformers checkpoint in float32.
        seed: of the adapter.
        targets: last parts of the names of the linear layers that it changes.

    """
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeForCausalLM

    generator = torch.Generator().manual_seed(seed)
    merged = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32)
    tensors = {}
    for name, parameter in merged.named_parameters():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in targets:
            continue
        out_features, in_features = parameter.shape
        a = torch.randn(RANK, in_features, generator=generator) * in_features**-0.5
        b = torch.randn(out_features, RANK, generator=generator) * RANK**-0.5
        tensors[f"base_model.model.{layer}.lora_A.weight"] = a
        tensors[f"base_model.model.{layer}.lora_B.weight"] = b
        parameter.data += SCALE * b @ a
    adapter = path / "adapter"
    adapter.mkdir(parents=True)
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": SCALE * RANK,
        "target_modules": list(targets),
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged.save_pretrained(path / "merged")
    return adapter, path / "merged"
