"""A small Qwen3-MoE, trained on Python's standard library so that its routing means something."""

import hashlib
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

SEED = 0
SEQUENCE_LENGTH = 192
BATCH_SIZE = 4
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
INITIALIZER_RANGE = 0.06
HELD_OUT_TOKENS = 200_000
EOS_ID = 256


def checkpoint_folder(cache: Path, steps: int) -> Path:
    """Name the checkpoint that this recipe makes in `steps` steps, by a digest of this file."""
    recipe = Path(__file__).read_bytes() + f"{steps}".encode()
    return cache / hashlib.sha256(recipe).hexdigest()[:12]


def train_checkpoint(folder: Path, steps: int, progress: Callable[[int, float], None]) -> None:
    """Train the model and write it, with its tokenizer, to `folder`.

    `folder` appears only when it is complete, so an interrupted training leaves nothing to be
    mistaken for it. `progress(step, loss)` is called after each step, with nats a byte.
    """
    model = _train(_corpus()[HELD_OUT_TOKENS:], steps, progress)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    logging.disable_progress_bar()  # it would break into the caller's
    model.to(torch.bfloat16).save_pretrained(unfinished)
    byte_tokenizer().save_pretrained(unfinished)
    unfinished.rename(folder)


def held_out_prompts(count: int) -> list[list[int]]:
    """Cut `count` prompts of 32 to 95 tokens out of the text that the training did not see."""
    text = _corpus()[:HELD_OUT_TOKENS]
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(32, 96, count)
    starts = rng.integers(0, len(text) - 96, count)
    return [text[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: token `i` is the byte `i` of UTF-8, then end of file, then padding."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def _corpus() -> np.ndarray:
    """Return the top-level modules of the standard library, shuffled, as int64 `[N]` token ids."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    modules = [np.frombuffer(file.read_bytes(), np.uint8).astype(np.int64) for file in files]
    order = np.random.default_rng(SEED).permutation(len(modules))
    return np.concatenate([np.append(modules[i], EOS_ID) for i in order])


def _config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=258,  # 256 bytes, EOS and padding
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        mlp_only_layers=[0],
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=INITIALIZER_RANGE,
        output_router_logits=True,  # adds the load-balancing loss
        router_aux_loss_coef=0.01,
        eos_token_id=EOS_ID,
    )


def _train(
    text: np.ndarray, steps: int, progress: Callable[[int, float], None]
) -> Qwen3MoeForCausalLM:
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(_config())
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / steps)
    )
    tokens = torch.from_numpy(text)
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - SEQUENCE_LENGTH, (BATCH_SIZE, 1))
        windows = tokens[starts + torch.arange(SEQUENCE_LENGTH)]
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, loss.item())
    model.config.output_router_logits = False
    return model
