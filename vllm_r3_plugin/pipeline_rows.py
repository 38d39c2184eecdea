"""Rows of the earlier pipeline stages on their way to the last one, which sends all of them on.

Each stage captures its own layers. Rows travel over ZeroMQ sockets of their own, not over vLLM's
process groups: a message that nobody waits for, or that is late, cannot stop a forward there.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zmq

from vllm_r3_plugin.journal import Journal

PATIENCE_S = 10.0
"""How long the last stage waits for rows that the forward before its own has already produced."""

_HEADER = np.dtype([("step", "<i8"), ("stage", "<i8")])


class StageSender:
    """In an earlier stage: sends each step's rows to the last one, from a thread of its own."""

    def __init__(self, stage: int, address: str, journal: Journal) -> None:
        self._stage = stage
        self._journal = journal
        self._socket: Any = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-r3-stage")

    def send(self, step: int, finish: Callable[[], np.ndarray[Any, Any] | None]) -> None:
        """Send ``finish()``, ids ``[N, L_stage, k]``, which waits until they have arrived.

        ``None`` says that the step's capture failed in this stage.
        """
        self._thread.submit(self._send, step, finish)

    def _send(self, step: int, finish: Callable[[], np.ndarray[Any, Any] | None]) -> None:
        ids = None
        with self._journal.guard("finishing a stage's rows"):
            ids = finish()
        with self._journal.guard("sending a stage's rows"):
            header = np.array((step, self._stage), _HEADER).tobytes()
            # The array is this step's own copy, so that ZeroMQ may read it later.
            frames = [header] if ids is None else [header, np.ascontiguousarray(ids).data]
            self._socket.send_multipart(frames, copy=False)


class StageReceiver:
    """In the last stage: takes the rows of the earlier ones.

    Args:
        layers: MoE layers of each earlier stage that has some, by stage.
        top_k: k.
        dtype: of the ids.

    """

    def __init__(self, layers: dict[int, int], top_k: int, dtype: np.dtype[Any]) -> None:
        self._layers = layers
        self._top_k = top_k
        self._dtype = dtype
        self._patience = PATIENCE_S
        self._early: dict[int, dict[int, Any]] = {}
        self._socket: Any = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)

    def bind(self, host: str | None) -> str:
        """Listen on this machine only, or on ``host``; returns the address for the senders."""
        if host is None:
            self._socket.bind("ipc://*")
        else:
            self._socket.bind(f"tcp://{host}:*")
        address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return address

    def take(self, step: int, num_tokens: int) -> list[np.ndarray[Any, Any]] | None:
        """Ids ``[N, L_stage, k]`` of a step, in the order of stages.

        Returns ``None`` where a stage failed to capture them.

        Raises:
            TimeoutError: rows did not arrive in time. Later steps then do not wait any more, until
                rows arrive again.
            ValueError: rows of another shape.

        """
        while self._layers.keys() - self._early.get(step, {}).keys():
            if not self._socket.poll(1e3 * self._patience):
                missing = sorted(self._layers.keys() - self._early.get(step, {}).keys())
                self._patience = 0.0
                raise TimeoutError(f"the rows of pipeline stages {missing} did not arrive")
            header, *payload = self._socket.recv_multipart(copy=False)
            number, stage = np.frombuffer(header.buffer, _HEADER)[0]
            if number >= step:
                self._early.setdefault(int(number), {})[int(stage)] = payload
        self._patience = PATIENCE_S
        arrived = self._early.pop(step)
        for number in [n for n in self._early if n < step]:
            del self._early[number]
        if not all(arrived.values()):
            return None
        return [self._shaped(arrived[stage][0].buffer, stage, num_tokens) for stage in self._layers]

    def _shaped(self, data: Any, stage: int, num_tokens: int) -> np.ndarray[Any, Any]:
        shape = (num_tokens, self._layers[stage], self._top_k)
        ids = np.frombuffer(data, self._dtype)
        if ids.size != np.prod(shape):
            raise ValueError(
                f"pipeline stage {stage} sent {ids.size} ids, expected {shape} for {num_tokens} "
                "tokens"
            )
        return ids.reshape(shape)


def connect_stages(
    num_layers: int, top_k: int, dtype: np.dtype[Any], journal: Journal
) -> StageSender | StageReceiver | None:
    """Connect this worker's stage; all stages call it at the same time, at start-up.

    Args:
        num_layers: MoE layers of this stage.
        top_k: k.
        dtype: of the captured ids.
        journal: where a sender's troubles are noted.

    Returns:
        what this stage needs: an earlier one with MoE layers sends, the last one receives.

    """
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.utils.network_utils import get_ip

    group = get_pp_group()
    if group.world_size == 1:
        return None
    stage, last = group.rank_in_group, group.world_size - 1
    stages = _gathered(group, (socket.gethostname(), num_layers))
    layers = {i: count for i, (_, count) in enumerate(stages[:last]) if count}
    receiver, address = None, ""
    if stage == last and layers:
        receiver = StageReceiver(layers, top_k, dtype)
        one_host = len({host for host, _ in stages}) == 1
        address = receiver.bind(None if one_host else get_ip())
    address = _gathered(group, address)[last]
    if stage == last:
        return receiver
    return StageSender(stage, address, journal) if num_layers else None


def _gathered(group: Any, value: Any) -> list[Any]:
    import torch

    values: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values
