"""Runs a function that starts a vLLM engine in a process of its own.

vLLM keeps global state (process groups, patched classes, compiled modules), so two engines do not
share a process. Importing it costs more than all else that a small engine does: one process imports
it and forks for each call. Where a call needs an environment of its own, which vLLM may read when
it is imported, or CUDA, which does not survive a fork, a fresh interpreter runs it.
"""

import atexit
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parents[3]
TIMEOUT_S = 600


def engine_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the settings that every engine in these tests runs under."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # A tiny model spends its time in thread barriers otherwise.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        # The n-gram drafter is compiled for seconds in each process, for drafts of milliseconds.
        "NUMBA_DISABLE_JIT": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(env or {}),
    }


class EngineProcessError(AssertionError):
    """The function raised in its process; `log` holds all that the process printed."""

    def __init__(self, function: str, log: str) -> None:
        super().__init__(f"{function} failed in its engine process:\n{log[-8000:]}")
        self.log = log


def run_in_engine_process(
    function: Callable[..., Any],
    *args: Any,
    in_process_core: bool = True,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Call a module-level `function` in a process of its own and return its (pickled) result.

    With `in_process_core` scheduler and worker live in that process too, where a rig reaches them.
    """
    import torch

    run = _run_in_fresh_interpreter if env or torch.cuda.is_available() else _run_in_fork
    # Read when an engine starts.
    late_env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if in_process_core else {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((function, args)))
        Path(folder, "log").touch()
        in_time = run(folder, {**late_env, **(env or {})})
        log = Path(folder, "log").read_text(errors="replace")
        if not in_time:
            log += f"\nstopped after {TIMEOUT_S} s"
        result = Path(folder, "result")
        if not result.exists():
            raise EngineProcessError(function.__qualname__, log)
        return pickle.loads(result.read_bytes())


def _run_in_fresh_interpreter(folder: str, env: Mapping[str, str]) -> bool:
    with open(Path(folder, "log"), "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, folder],
            cwd=REPOSITORY,
            env=engine_environment(env),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return True


def _run_in_fork(folder: str, env: Mapping[str, str]) -> bool:
    forks = _start_forking()
    assert forks.stdin is not None
    assert forks.stdout is not None
    forks.stdin.write(json.dumps([folder, dict(env)]).encode() + b"\n")
    pid = int(forks.stdout.readline())
    in_time = False
    try:
        in_time = bool(select.select([forks.stdout], [], [], TIMEOUT_S)[0])
    finally:
        if not in_time:
            os.killpg(pid, signal.SIGKILL)
        assert forks.stdout.readline() == b"ended\n"
    return in_time


@cache
def _start_forking() -> subprocess.Popen[bytes]:
    """Start the process that forks; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=REPOSITORY,
        env=engine_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )


def _fork_for_each_call() -> None:
    """Read folder and environment of each call from stdin, say the fork's id, and when it ended."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import_vllm()
    for line in sys.stdin:
        folder, env = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setsid()
            log = os.open(Path(folder, "log"), os.O_WRONLY)
            for standard, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
                os.dup2(opened, standard)
            os.environ.update(env)
            _call_and_exit(folder)
        print(pid, file=replies)
        os.waitpid(pid, 0)
        print("ended", file=replies)


def _call_and_exit(folder: str) -> NoReturn:
    """Without tearing down all modules, which takes as long as importing them."""
    try:
        _call(folder)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(0)


def _import_vllm() -> None:
    import vllm.model_executor.models.qwen3_moe
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from vllm_r3_plugin import seam_check

    assert seam_check.missing() == []  # by importing what they stand in


def _call(folder: str) -> None:
    function, args = pickle.loads(Path(folder, "call").read_bytes())
    value = function(*args)
    Path(folder, "result").write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _call(sys.argv[1])
    else:
        _fork_for_each_call()
