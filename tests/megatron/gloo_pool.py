"""A pool of gloo processes that run test functions under any parallel layout of Megatron."""

import faulthandler
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

GRACE_S = 5  # how long the other ranks may take to fail too once one has failed


class GlooPool:
    """`world_size` processes, started at the first `run` and kept for the next."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 120, **groups: int | None
    ) -> list[Any]:
        """Call a module-level `function(*args)` in every rank; return its results in rank order.

        `groups` go to `initialize_model_parallel`. Results and arguments travel by pickle.

        Raises:
            RuntimeError: a rank raised (with its traceback) or died.
            TimeoutError: a rank did not answer; its stack is on stderr.
        """
        if not self._ranks:
            self._start()
        task = pickle.dumps((function, args, groups, timeout_s))
        for _, connection in self._ranks:
            connection.send_bytes(task)

        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        ranks = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        while ranks and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(ranks), timeout=left):
                rank = ranks.pop(connection)  # type: ignore[call-overload]
                try:
                    failure, result = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    failure, result = "the process died", None
                if failure:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                results[rank] = result

        if ranks:
            self.close()
        if failures:
            raise RuntimeError(
                "".join(f"\nrank {r} of {self.world_size}: {failures[r]}" for r in sorted(failures))
            )
        if ranks:
            raise TimeoutError(
                f"ranks {sorted(ranks.values())} of {self.world_size} did not end "
                f"{function.__name__} within {timeout_s} s"
            )
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Kill the processes; the next `run` starts new ones."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = f"{tempfile.mkdtemp(prefix='gloo_pool_')}/store"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, store), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def _serve(connection: Connection, rank: int, world_size: int, store: str) -> None:
    import torch

    from megatron_r3 import cpu

    torch.set_num_threads(1)
    cpu.enable()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_answer(task)))


def _answer(task: bytes) -> tuple[str | None, Any]:
    from megatron.core import parallel_state

    from megatron_r3 import cpu

    try:
        function, args, groups, timeout_s = pickle.loads(task)
        faulthandler.dump_traceback_later(timeout_s)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**groups)
        cpu.seed(1)
        return None, function(*args)
    except BaseException:
        return traceback.format_exc(), None
    finally:
        faulthandler.cancel_dump_traceback_later()
