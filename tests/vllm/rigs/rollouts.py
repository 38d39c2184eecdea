"""What an engine returned for a request, in plain arrays that leave the engine's process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tiny_models import FIRST_PROMPT_TOKEN, LAST_PROMPT_TOKEN, QWEN3_MOE, Shape


@dataclass
class Rollout:
    """One completion: its tokens, its routed experts as returned, and what a rig saw."""

    request: str
    index: int
    prompt: list[int]
    output: list[int]
    routed: np.ndarray | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_start: int = 0
    num_cached: int = 0
    # The routing that the independent hook saw for each row, [P+O-1, L_moe, k].
    hooked: np.ndarray | None = None
    # Rows that were computed again later with other experts, which must not replace the first.
    superseded: int = 0
    num_preemptions: int = 0
    # VLLM used KV that is not that of these tokens.
    is_garbled: bool = False
    shape: Shape = QWEN3_MOE

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    def moe_ids(self) -> np.ndarray:
        """The MoE layers' ids [T, L_moe, k], once the array has the form that vLLM documents."""
        self.check_form()
        assert self.routed is not None
        return self.routed[:, list(self.shape.moe_layers)]

    def check_form(self) -> None:
        """Raise AssertionError unless the array is what vLLM's native path would have returned."""
        assert self.routed is not None, f"request {self.request}: no routed experts"
        rows = len(self.tokens) - 1 - self.prompt_start
        shape = self.shape
        assert self.routed.shape == (rows, shape.num_layers, shape.top_k), (
            f"request {self.request}: shape {self.routed.shape}, "
            f"expected {(rows, shape.num_layers, shape.top_k)}"
        )
        assert self.routed.dtype == (np.uint8 if shape.num_experts <= 256 else np.uint16)
        dense = [layer for layer in range(shape.num_layers) if layer not in shape.moe_layers]
        assert not self.routed[:, dense].any(), "a dense layer is not zero"

    def ordered_differences(self) -> int:
        """Rows whose ids differ, slot order included, from those that the hook saw."""
        assert self.hooked is not None
        wrong = self.moe_ids() != self.hooked[self.prompt_start :]
        return int(wrong.any(axis=(1, 2)).sum())


def from_outputs(
    outputs: Sequence[Any], prompt_starts: Sequence[int] | None = None
) -> list[Rollout]:
    """Flatten vLLM's RequestOutputs, one rollout for each completion."""
    starts = prompt_starts or [0] * len(outputs)
    return [
        Rollout(
            request=output.request_id,
            index=completion.index,
            prompt=list(output.prompt_token_ids),
            output=list(completion.token_ids),
            routed=completion.routed_experts,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            prompt_start=start,
            num_cached=output.num_cached_tokens or 0,
        )
        for output, start in zip(outputs, starts, strict=True)
        for completion in output.outputs
    ]


def random_prompts(rng: np.random.Generator, lengths: Iterable[int]) -> list[list[int]]:
    """One prompt of random bytes for each length."""
    return [
        rng.integers(FIRST_PROMPT_TOKEN, LAST_PROMPT_TOKEN + 1, int(n)).tolist() for n in lengths
    ]
