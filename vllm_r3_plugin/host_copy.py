"""Copies of a step's tensors on their way from the device to the host."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch


def on_host(tensor: torch.Tensor) -> torch.Tensor | np.ndarray[Any, Any]:
    """The same memory as an array, if it is on the host.

    Between two forwards each torch operation costs ten times what numpy's does.
    """
    return tensor.numpy() if tensor.is_cpu else tensor


class HostCopy:
    """The first rows of a tensor that the next step overwrites; on an accelerator not awaited.

    The rows are set aside in the order of the current stream. From there they travel on a stream of
    their own, into pinned memory, while the next step runs; only :meth:`wait` waits for them.

    Args:
        tensor: ``[max rows, ...]``, or what :func:`on_host` made of it.
        num_rows: rows to copy.
        dtype: of the copy, as wide as that of ``tensor``, which is the default.

    """

    def __init__(
        self,
        tensor: torch.Tensor | np.ndarray[Any, Any],
        num_rows: int,
        dtype: np.dtype[Any] | None = None,
    ) -> None:
        self._copied: torch.Event | None = None
        if isinstance(tensor, np.ndarray):
            array = tensor[:num_rows].copy()
        else:
            array = self._begin(tensor[:num_rows])
        self._array: np.ndarray[Any, Any] = array if dtype is None else array.view(dtype)

    def wait(self) -> np.ndarray[Any, Any]:
        """Return the rows, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._array

    def _begin(self, rows: torch.Tensor) -> np.ndarray[Any, Any]:
        aside = rows.clone()
        stream = _copy_stream(rows.device)
        stream.wait_stream(torch.accelerator.current_stream(rows.device))
        with stream:
            # Recycled by torch once nobody holds it and its copy is done.
            host = torch.empty(aside.shape, dtype=aside.dtype, pin_memory=True)
            host.copy_(aside, non_blocking=True)
        aside.record_stream(stream)
        self._copied = torch.Event(rows.device)
        self._copied.record(stream)
        return np.asarray(host.numpy())


@cache
def _copy_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)
