"""Wraps a method of vLLM in place, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(cls: type, name: str, replacement: Callable[..., Any]) -> None:
    """Let ``replacement(original, self, ...)`` answer calls of ``cls.name``; repeats do nothing."""
    original = getattr(cls, name)
    if hasattr(original, "moe_r3_original"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapped.moe_r3_original = original  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)
