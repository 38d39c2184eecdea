"""A pool of gloo processes that run test functions under any parallel layout of Megatron."""

import faulthandler
import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

GRACE_S = 3  # how long the other ranks may take to fail too once one has failed


class GlooPool:
    """`world_size` processes, started at the first `run` and kept for the next."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: dict[Any, tuple[int, BaseProcess]] = {}  # by connection, in rank order

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 120, **groups: int | None
    ) -> list[Any]:
        """Call a module-level `function(*args)` in every rank; return its results in rank order.

        `groups` go to `initialize_model_parallel`; process groups are new in each run. Results and
        arguments travel by pickle.

        Raises:
            RuntimeError: a rank raised (with its traceback) or died.
            TimeoutError: a rank did not answer; its stack is on stderr.

        """
        if not self._ranks:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            task = pickle.dumps((function, args, groups, self.world_size, store, timeout_s))
            for connection in self._ranks:
                connection.send_bytes(task)
            return self._collect(function.__name__, timeout_s)

    def _collect(self, name: str, timeout_s: float) -> list[Any]:
        results, failures = {}, {}
        pending = {connection: rank for connection, (rank, _) in self._ranks.items()}
        broken = False
        deadline = time.monotonic() + timeout_s
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(pending, timeout=left):
                rank = pending.pop(connection)
                try:
                    results[rank], failure = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    failure, broken = "the process died", True
                if failure:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if pending or broken:
            self.close()
        if failures:
            raise RuntimeError(
                "".join(f"\nrank {r} of {self.world_size}: {failures[r]}" for r in sorted(failures))
            )
        if pending:
            raise TimeoutError(
                f"ranks {sorted(pending.values())} of {self.world_size} did not end {name} within "
                f"{timeout_s} s"
            )
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Kill the processes; the next `run` starts new ones."""
        for connection, (_, process) in self._ranks.items():
            connection.close()
            process.kill()
            process.join()
        self._ranks = {}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self._ranks[ours] = rank, process
        for connection in self._ranks:
            connection.recv_bytes()  # imports are done; timeouts count from here


def _serve(connection: Any, rank: int) -> None:
    import torch

    from megatron_r3 import cpu

    torch.set_num_threads(1)
    cpu.enable()
    connection.send_bytes(b"ready")
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_answer(task, rank)))


def _answer(task: bytes, rank: int) -> tuple[Any, str | None]:
    """The result of a task, or why there is none."""
    import torch
    from megatron.core import parallel_state

    from megatron_r3 import cpu

    try:
        function, args, groups, world_size, store, timeout_s = pickle.loads(task)
        faulthandler.dump_traceback_later(timeout_s)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        parallel_state.initialize_model_parallel(**groups)
        cpu.seed(1)
        return function(*args), None
    except BaseException:
        return None, traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()  # models hold groups in cycles, and each group holds threads
