"""Check an installation, and a model with --model.

Versions, whether vLLM loads the plugin, whether every private symbol of vLLM and megatron-core that
moe-r3 touches is there, whether vLLM would start this model with routing captured, and what a run
costs in memory. Arguments behind -- are those of `vllm serve`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared_schema.cli.checks import Check
from shared_schema.cli.doctor_environment import check_environment
from shared_schema.cli.doctor_megatron import check_megatron
from shared_schema.cli.doctor_model import check_model
from shared_schema.cli.doctor_vllm import check_vllm
from shared_schema.cli.files import read_config
from shared_schema.cli.terminal import escape, grid, print_json, show, track

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

EPILOG = """\
examples:
  r3 doctor
  r3 doctor --model Qwen3-30B-A3B/config.json
  r3 doctor --model Qwen3-30B-A3B -- --tensor-parallel-size 4

A library that is not installed is a warning: the rollout needs no
megatron-core, the trainer no vLLM. Exit status 1 means that a line is an error.
"""

_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``r3 doctor``."""
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="the model's folder or its config.json"
    )
    parser.add_argument(
        "--kv-tokens",
        type=_positive,
        default=1_000_000,
        metavar="N",
        help="tokens that vLLM's KV cache holds, as its log says (default: %(default)s)",
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=_positive,
        default=32_768,
        metavar="N",
        help="tokens of a micro-batch on one rank of the trainer (default: %(default)s)",
    )
    parser.add_argument(
        "engine_arguments", nargs="*", metavar="-- ARGUMENT", help="one of `vllm serve`"
    )


def run(arguments: argparse.Namespace) -> int:
    """Make all checks; 1 if one is an error."""
    config = None if arguments.model is None else read_config(arguments.model)
    parts = 3 if config is None else 4
    checks = [
        check
        for found in track(_examine(arguments, config), "checking", total=parts)
        for check in found
    ]
    if arguments.json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        show(_table(checks))
    return int(any(check.status == "error" for check in checks))


def _examine(
    arguments: argparse.Namespace, config: dict[str, Any] | None
) -> Iterator[Iterable[Check]]:
    yield check_environment()
    checks, engine = _apart(check_vllm, config, arguments.engine_arguments) or (
        [_died("vllm")],
        None,
    )
    yield checks
    yield _apart(check_megatron) or [_died("megatron.core")]
    if config is not None:
        yield check_model(config, engine, arguments.kv_tokens, arguments.micro_batch_tokens)


def _apart(check: Callable[..., T], *args: Any) -> T | None:
    """Check in a process of its own: frameworks print when they are imported, and may crash.

    ``None`` if the process died.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_be_quiet) as pool:
        try:
            return pool.submit(check, *args).result()
        except BrokenProcessPool:
            return None


def _be_quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _died(name: str) -> Check:
    return Check(
        name.partition(".")[0],
        "error",
        f"the process that imported {name} died",
        f"see why: python -c 'import {name}'",
    )


def _table(checks: list[Check]) -> Table:
    lines = grid(3)
    for check in checks:
        style = _STYLES[check.status]
        lines.add_row(
            f"[{style}]{check.status}[/{style}]",
            f"[bold]{check.name}[/bold]",
            escape(check.message),
        )
        if check.fix:
            lines.add_row("", "", f"fix: {escape(check.fix)}")
    return lines


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number
