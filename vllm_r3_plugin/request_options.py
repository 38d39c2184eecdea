"""What one request asks for: the ``r3_…`` keys of its ``SamplingParams.extra_args``.

Over HTTP they are keys of ``vllm_xargs``, whose values are strings and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_r3_plugin.options import REQUEST_CHOICES, R3Options, require_choice

_PREFIX = "r3_"
_KEYS = (*REQUEST_CHOICES, "start")


@dataclass(frozen=True)
class RequestOptions:
    """A request's own choices, and the server's defaults where it made none.

    Attributes:
        routing: ``"on"`` or ``"off"``: whether routed experts are returned at all.
        start: position of the first row returned; ``routed_experts_prompt_start`` says the same.
        encoding: ``"native"`` or ``"r3"``.
        delivery: ``"response"`` or ``"fetch"``.
        unrecorded: ``"omit"`` or ``"sentinel"``; the r3 encoding marks each such row anyway.

    """

    routing: str
    start: int
    encoding: str
    delivery: str
    unrecorded: str

    @classmethod
    def of(cls, sampling_params: Any, defaults: R3Options) -> RequestOptions:
        """Read them from a request's sampling parameters.

        Raises:
            ValueError: an unknown key, a wrong value, or two different starts.

        """
        given = _given(sampling_params.extra_args or {})
        chosen = {name: given.get(name, getattr(defaults, name)) for name in REQUEST_CHOICES}
        for name, choices in REQUEST_CHOICES.items():
            require_choice(_PREFIX + name, chosen[name], choices)
        return cls(start=_start(given, sampling_params.routed_experts_prompt_start), **chosen)

    def require_start_within(self, prompt_len: int) -> None:
        """Raise unless the first row belongs to the prompt, or is the first one after it."""
        if self.start > prompt_len:
            raise ValueError(
                f"r3_start is {self.start}, expected 0 to {prompt_len}, the length of the prompt: "
                "pass the position of the first row that you need."
            )

    def write_to(self, sampling_params: Any) -> None:
        """Spell them out, the start in vLLM's own field; the user's mapping is not changed."""
        given = sampling_params.extra_args or {}
        others = {key: value for key, value in given.items() if not _is_ours(key)}
        ours = {_PREFIX + name: getattr(self, name) for name in REQUEST_CHOICES}
        sampling_params.extra_args = {**others, **ours}
        sampling_params.routed_experts_prompt_start = self.start


def _given(extra_args: dict[str, Any]) -> dict[str, Any]:
    given = {key.removeprefix(_PREFIX): extra_args[key] for key in extra_args if _is_ours(key)}
    unknown = sorted(set(given) - set(_KEYS))
    if unknown:
        raise ValueError(
            f"the request has the unknown key {_PREFIX + unknown[0]!r}, expected only "
            f"{', '.join(_PREFIX + key for key in sorted(_KEYS))}: remove it."
        )
    return given


def _start(given: dict[str, Any], prompt_start: int) -> int:
    start = given.get("start", prompt_start)
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(
            f"r3_start is {start!r}, expected an integer from 0: pass the position of the first "
            "row that you need."
        )
    if prompt_start not in (0, start):
        raise ValueError(
            f"r3_start is {start} with routed_experts_prompt_start {prompt_start}, expected one "
            "of them or the same number twice: leave one out."
        )
    return start


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(_PREFIX)
