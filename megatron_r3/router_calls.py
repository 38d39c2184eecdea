"""Which frame each call of each router of one model chunk uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_r3 import recompute
from megatron_r3.errors import ReplayStateError
from megatron_r3.frames import Frame
from megatron_r3.recompute import CallLog

Mode = Literal["record", "replay", "native"]


@dataclass(eq=False)
class ChunkCalls:
    """The calls of one chunk's routers while schedules are open.

    Attributes:
        name: of the chunk, for messages.
        layers: layer number of each local router as Megatron counts, for messages.
        modes: of the open schedules, the innermost last.
        frames: of the outermost schedule, in the order they were fed.

    """

    name: str
    layers: Sequence[int]
    modes: list[Mode] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    _logs: list[CallLog[Frame]] = field(default_factory=list)
    _spent: list[Frame] = field(default_factory=list)
    _opened_at: int = 0
    _last_closed: range = range(0)

    @property
    def schedule_is_open(self) -> bool:
        """Whether any schedule is open."""
        return bool(self.modes)

    def open(self, mode: Mode) -> None:
        """Enter a schedule; only native ones nest."""
        if not self.modes:
            self._logs = [CallLog() for _ in self.layers]
            self._opened_at = recompute.sequence_number()
        self.modes.append(mode)

    def close(self) -> None:
        """Leave the innermost schedule, and forget everything with the outermost."""
        mode = self.modes.pop()
        if not self.modes:
            if mode != "native":
                self._last_closed = range(self._opened_at, recompute.sequence_number())
            self._logs, self.frames, self._spent = [], [], []

    def push(self, frame: Frame) -> None:
        """Make ``frame`` the one that the next forward uses."""
        if self.frames:
            self._check_forward(self.frames[-1])
        self.frames.append(frame)
        if not self.layers and self.modes[0] == "replay":
            frame.release()

    def resolve(self, layer: int) -> tuple[Frame | None, bool]:
        """The frame of a call of local router ``layer`` and whether the call is a recompute.

        ``None`` instead of a frame means: route natively.

        Raises:
            ReplayStateError: no frame was fed for this forward, or none fits this recompute.

        """
        if recompute.in_backward():
            return self._of_recompute(layer), True
        if not self.modes:
            return None, False
        frame = None if self.modes[-1] == "native" else self._of_forward(layer)
        self._logs[layer].note(frame)
        return frame, False

    def _of_forward(self, layer: int) -> Frame:
        if not self.frames or self.frames[-1].forwards[layer]:
            done = len(self.frames)
            raise ReplayStateError(
                f"layer {self.layers[layer]} of {self.name} runs a forward after {done} fed "
                f"micro-batches, expected feed() for number {done} first: call it in "
                "forward_step before the model, or open schedule('native')."
            )
        frame = self.frames[-1]
        frame.forwards[layer] += 1
        if not (frame.backward_follows and recompute.may_be_repeated()):
            self._note_last_use(frame)
        return frame

    def _of_recompute(self, layer: int) -> Frame | None:
        if not torch.is_grad_enabled():
            raise ReplayStateError(
                f"layer {self.layers[layer]} of {self.name} runs without gradients inside a "
                "recompute, expected no checkpoint inside a checkpoint, whose calls cannot be told "
                "apart: leave one of the two out."
            )
        node, _ = recompute.running_node()
        if node in self._last_closed:
            raise ReplayStateError(
                f"layer {self.layers[layer]} of {self.name} is recomputed after its schedule was "
                "closed, expected forward and backward inside it: put loss.backward() into the "
                "with block."
            )
        if not self.modes or node < self._opened_at:
            return None
        frame = self._logs[layer].repeated()
        if frame is not None:
            if frame.recomputes[layer]:
                raise ReplayStateError(
                    f"layer {self.layers[layer]} of {self.name} is recomputed a second time for "
                    f"micro-batch {frame.micro_batch}, expected once: run each graph backward "
                    "once, without retain_graph, and put no checkpoint inside a checkpoint."
                )
            if frame.is_released:
                raise ReplayStateError(
                    f"layer {self.layers[layer]} of {self.name} is recomputed for micro-batch "
                    f"{frame.micro_batch}, whose routes were given back behind its forward, "
                    "expected none without gradients: call feed() where gradients are enabled."
                )
            frame.recomputes[layer] += 1
            self._note_last_use(frame)
        return frame

    def _note_last_use(self, frame: Frame) -> None:
        frame.uses_left -= 1
        if not frame.uses_left and self.modes[0] == "replay":
            self._spent.append(frame)

    def release_spent(self) -> None:
        """Give the device memory of frames back that no call will use again.

        For a router to call when it has routed: what it was given last is still in use until then.
        """
        for frame in self._spent:
            frame.release()
        self._spent.clear()

    def check_balance(self) -> None:
        """Check that every fed frame was used as often as its routers had to run.

        Raises:
            ReplayStateError: a frame that some router never used, or that some router was
                recomputed with in some micro-batches and not in others.

        """
        for frame in self.frames:
            self._check_forward(frame)
        recomputed = [frame for frame in self.frames if any(frame.recomputes)]
        for layer, number in enumerate(self.layers):
            missed = [f.micro_batch for f in recomputed if not f.recomputes[layer]]
            if missed and len(missed) < len(recomputed):
                raise ReplayStateError(
                    f"layer {number} of {self.name} was recomputed in "
                    f"{len(recomputed) - len(missed)} micro-batches but not in {missed}, expected "
                    "all or none: a recompute used the frame of another micro-batch."
                )

    def _check_forward(self, frame: Frame) -> None:
        unused = [n for n, used in zip(self.layers, frame.forwards, strict=True) if not used]
        if unused:
            raise ReplayStateError(
                f"micro-batch {frame.micro_batch} was fed to {self.name}, but its layers {unused} "
                "never ran, expected one forward of every router: call feed once for each forward."
            )
