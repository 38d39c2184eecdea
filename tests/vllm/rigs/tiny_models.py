"""Tiny random Qwen3 models with a byte-level tokenizer, made on the spot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_EXPERTS = 32
TOP_K = 4
NUM_LAYERS = 4
MOE_LAYERS = (1, 2, 3)
VOCAB_SIZE = 320


@dataclass(frozen=True)
class Shape:
    """How many layers a model has, which of them route, and among how many experts."""

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int


QWEN3_MOE = Shape(NUM_LAYERS, MOE_LAYERS, NUM_EXPERTS, TOP_K)
EOS_TOKEN_ID = 257
# Prompts are drawn from plain bytes, so that no prompt holds a special token.
FIRST_PROMPT_TOKEN, LAST_PROMPT_TOKEN = 0, 255

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 258,
}


def make_moe(path: Path, seed: int = 0) -> Path:
    """Write a float32 Qwen3-MoE whose first layer is dense."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=TOP_K,
            moe_intermediate_size=32,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
            norm_topk_prob=True,
        )
    ).float()
    widen_gates(model)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def make_other_routers(path: Path, model_path: Path) -> Path:
    """Write the model of `model_path` with other routers: its weights after an update."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(1)
    model = Qwen3MoeForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    widen_gates(model)
    model.save_pretrained(path)
    return path


def widen_gates(model: Any) -> None:
    """Draw the routers' weights anew, with standard deviation 0.5.

    Neighbouring router logits are then far enough apart that two correct float32 implementations
    choose the same experts.
    """
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(parameter, std=0.5)


def make_dense(path: Path) -> Path:
    """Write a float32 Qwen3 without any MoE layer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**COMMON)).float().save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """Write a tokenizer with a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<bos>", "<eos>", "<pad>"]
    fillers = [f"<unused{i}>" for i in range(VOCAB_SIZE - len(alphabet) - len(specials))]
    vocab = {token: i for i, token in enumerate([*alphabet, *specials, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(path)
