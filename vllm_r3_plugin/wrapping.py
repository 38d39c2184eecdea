"""Wraps a method of vLLM in place, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_wrapped: set[tuple[Any, str]] = set()


def wrap_once(cls: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Let ``replacement(original, self, ...)`` answer calls of ``cls.name``; repeats do nothing.

    ``cls`` may be a module. Others may wrap what we have wrapped: that is no reason to do it again.
    """
    if is_wrapped(cls, name):
        return
    _wrapped.add((cls, name))
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapped.moe_r3_original = original  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)


def is_wrapped(cls: Any, name: str) -> bool:
    """Whether :func:`wrap_once` has wrapped it in this process."""
    return (cls, name) in _wrapped
