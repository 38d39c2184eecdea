"""What travels from the engine core to the front end in ``EngineCoreOutput.routed_experts``.

vLLM's front end joins the arrays of a request's outputs and cuts tokens behind a stop string off
their end, both along the first axis; both forms below survive that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float16, Int8, Integer, UInt8

from shared_schema import RoutingLayout
from vllm_r3_plugin.frozen_rows import Rows


def rows_array(
    ids: Integer[np.ndarray, "T L k"], status: UInt8[np.ndarray, " T"]
) -> UInt8[np.ndarray, "T nbytes"]:
    """The bytes of each row's ids, then its status."""
    row_nbytes = math.prod(ids.shape[1:]) * ids.itemsize
    array = np.empty((len(status), row_nbytes + 1), np.uint8)
    array[:, :-1] = np.ascontiguousarray(ids).view(np.uint8).reshape(-1, row_nbytes)
    array[:, -1] = status
    return array


def rows_of(array: UInt8[np.ndarray, "T nbytes"], layout: RoutingLayout) -> Rows:
    """Ids and status of each row; the inverse of :func:`rows_array`."""
    ids = np.ascontiguousarray(array[:, :-1]).view(layout.dtype)
    return ids.reshape(-1, layout.num_moe_layers, layout.top_k), array[:, -1].copy()


def void_array(layout: RoutingLayout) -> Float16[np.ndarray, "0 nbytes"]:
    """No rows, of a dtype that rows never have: joined with earlier ones it makes all of them void.

    For requests that send rows in parts, when one of the parts is lost.
    """
    return np.empty((0, layout.row_nbytes + 1), np.float16)


def is_void(array: np.ndarray[Any, Any]) -> bool:
    """Whether a :func:`void_array` is part of ``array``."""
    return bool(array.dtype == np.float16)


def ticket_array(ticket: str, num_tokens: int) -> Int8[np.ndarray, "copies characters"]:
    """A ticket in place of rows; more copies than the output has tokens that may be cut off."""
    return np.tile(np.frombuffer(ticket.encode("ascii"), np.int8), (num_tokens + 1, 1))


def ticket_of(array: np.ndarray[Any, Any]) -> str | None:
    """The ticket in ``array``, or None if it holds rows."""
    return array[0].tobytes().decode("ascii") if array.dtype == np.int8 else None
