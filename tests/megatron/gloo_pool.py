"""Gloo processes that run test functions under any parallel layout of Megatron."""

import contextlib
import faulthandler
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

GRACE_S = 5  # how long the other ranks may take to fail too once one has failed
# All pools fork from one process that has imported everything. Each run has ranks of its own: what
# a run leaves behind (Megatron never ends a group, and each gloo group has threads) ends with them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.megatron.gloo_rank"])


class GlooPool:
    """`world_size` ranks; each `run` starts new ones."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 300, **groups: int | None
    ) -> list[Any]:
        """Call a module-level `function(*args)` in every rank; return its results in rank order.

        `groups` go to `initialize_model_parallel`. Results and arguments travel by pickle.

        Raises:
            RuntimeError: a rank raised (with its traceback) or died.
            TimeoutError: a rank did not answer; its stack is on stderr.

        """
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            task = pickle.dumps((function, args, groups, self.world_size, store, timeout_s))
            ranks: dict[Any, tuple[int, BaseProcess]] = {}
            try:
                for rank in range(self.world_size):
                    ours, theirs = _CONTEXT.Pipe()
                    process = _CONTEXT.Process(target=_serve, args=(theirs, rank))
                    process.start()
                    theirs.close()
                    ranks[ours] = rank, process
                for connection in ranks:
                    connection.recv_bytes()  # imports are done; timeouts count from here
                for connection in ranks:
                    connection.send_bytes(task)
                return self._collect(ranks, function.__name__, timeout_s)
            finally:
                for connection in ranks:
                    connection.close()
                for _, process in ranks.values():
                    process.join(timeout=1)  # ends by itself, with what it started
                    process.kill()
                    process.join()

    def _collect(
        self, ranks: dict[Any, tuple[int, BaseProcess]], name: str, timeout_s: float
    ) -> list[Any]:
        results, failures = {}, {}
        pending = {connection: rank for connection, (rank, _) in ranks.items()}
        deadline = time.monotonic() + timeout_s
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(pending, timeout=left):
                rank = pending.pop(connection)
                try:
                    results[rank], failure = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    failure = "the process died"
                if failure:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE_S)
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


def _serve(connection: Any, rank: int) -> None:
    import torch

    from megatron_r3 import cpu

    torch.set_num_threads(1)
    cpu.enable()
    with contextlib.suppress(EOFError):
        connection.send_bytes(b"ready")
        connection.send_bytes(pickle.dumps(_answer(connection.recv_bytes(), rank)))
        connection.recv_bytes()  # the other ranks may still need this one's groups


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
