"""Which forward of a router a recompute repeats, found by autograd's sequence numbers.

Autograd numbers its nodes in the order of their creation, and a node keeps its number until the
backward pass. A recompute runs inside a node:

* a reentrant checkpoint (Megatron's, TE's and torch's own) is a node created just before its
  forward ran under ``no_grad``: the recompute repeats the first router call after the node;
* a non-reentrant checkpoint recomputes when some node of its segment asks for a saved tensor, in
  general one behind the router: the recompute repeats the last router call before the node.

So the order in which micro-batches run backward does not matter, and no mode has to be flipped.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from megatron_r3.errors import ReplayStateError

T = TypeVar("T")


def in_backward() -> bool:
    """Whether this thread runs a node of a backward pass."""
    task: int = torch._C._current_graph_task_id()
    return task != -1


def sequence_number() -> int:
    """The number that autograd gives to the next node of this thread."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def running_node() -> tuple[int, bool]:
    """Number of the node that runs, and whether it is a reentrant checkpoint."""
    node = torch._C._current_autograd_node()
    return node._sequence_nr(), "Checkpoint" in node.name()


def may_be_repeated() -> bool:
    """Whether a checkpoint may repeat the forward that runs now, in a step with a backward pass.

    A reentrant one runs its forward without gradients, any other hooks into what is saved.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return not torch.is_grad_enabled() or hooks is not None


@dataclass
class _Calls(Generic[T]):
    numbers: list[int] = field(default_factory=list)
    frames: list[T | None] = field(default_factory=list)

    def append(self, number: int, frame: T | None) -> None:
        self.numbers.append(number)
        self.frames.append(frame)


class CallLog(Generic[T]):
    """The forwards of one router since a schedule began, each with the frame that it used."""

    def __init__(self) -> None:
        self._with_grad: _Calls[T] = _Calls()
        self._without_grad: _Calls[T] = _Calls()

    def note(self, frame: T | None) -> None:
        """Remember a forward that runs now; ``None`` is one that routes natively."""
        calls = self._with_grad if torch.is_grad_enabled() else self._without_grad
        calls.append(sequence_number(), frame)

    def repeated(self) -> T | None:
        """The frame of the forward that the running recompute repeats.

        Raises:
            ReplayStateError: no forward was noted that fits the running node.

        """
        number, reentrant = running_node()
        if reentrant:
            calls = self._without_grad
            index = bisect.bisect_left(calls.numbers, number)
        else:
            calls = self._with_grad
            index = bisect.bisect_right(calls.numbers, number) - 1
        if not 0 <= index < len(calls.numbers):
            raise ReplayStateError(
                f"a recompute runs in autograd node {number}, but none of this router's "
                f"{len(calls.numbers)} forwards fits it: run forwards and backwards in one "
                "schedule and one thread, without a checkpoint inside a checkpoint."
            )
        return calls.frames[index]
