"""Prompts for a model that a reader brings: pieces of Python's standard library."""

import sysconfig
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

SEED = 0
SHORTEST, LONGEST = 32, 95
MODULES = 40


def library_prompts(model: Path, count: int) -> list[list[int]]:
    """Cut `count` prompts of 32 to 95 of the model's own tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:MODULES]
    text = "\n".join(file.read_text(errors="replace") for file in files)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(SHORTEST, LONGEST + 1, count)
    starts = rng.integers(0, len(tokens) - LONGEST, count)
    return [tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)]
