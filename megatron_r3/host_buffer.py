"""Arrays that travel to the device together, in one asynchronous copy behind the compute."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_ALIGN = 16
_SPARE = 8 * _ALIGN  # for the gaps between as many arrays


class HostBuffer:
    """Arrays in one piece of host memory, pinned where the device is a GPU.

    The copy runs on a stream of its own: while the GPU still computes earlier micro-batches, it
    does not wait for them, and the compute stream waits for it without the host. torch reuses the
    pinned memory when the copy is done. On the CPU the arrays stay where they are.

    Args:
        capacity: bytes of all arrays; room for aligning them comes on top.
        device: where the arrays are wanted.

    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._bytes = torch.empty(capacity + _SPARE, dtype=torch.uint8, pin_memory=pinned)
        self._device = device
        self._parts: list[tuple[slice, Sequence[int], torch.dtype]] = []

    def reserve(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """An uninitialised array in the buffer, to be written before :meth:`to_device`."""
        begin = -(-self._used // _ALIGN) * _ALIGN
        end = begin + math.prod(shape) * dtype.itemsize
        self._parts.append((slice(begin, end), shape, torch_dtype(dtype)))
        part: np.ndarray[Any, Any] = self._bytes.numpy()[begin:end]
        return part.view(dtype).reshape(shape)

    def append(self, array: np.ndarray[Any, Any]) -> None:
        """Copy ``array`` into the buffer."""
        self.reserve(array.shape, array.dtype)[...] = array

    def to_device(self) -> list[torch.Tensor]:
        """The arrays on the device, in the order in which they came."""
        there = self._bytes[: self._used]
        if self._device.type == "cuda":
            compute = torch.cuda.current_stream(self._device)
            copies = _copy_stream(self._device)
            with torch.cuda.stream(copies):
                there = there.to(self._device, non_blocking=True)
            compute.wait_stream(copies)
            there.record_stream(compute)
        return [there[part].view(dtype).view(*shape) for part, shape, dtype in self._parts]

    @property
    def _used(self) -> int:
        return int(self._parts[-1][0].stop) if self._parts else 0


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a numpy dtype."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
