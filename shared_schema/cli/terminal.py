"""What people see: tables and progress bars; and what programs read: JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from shared_schema.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


def print_json(document: dict[str, Any]) -> None:
    """Print one document; numpy's numbers and arrays become plain ones, NaN becomes null."""
    print(json.dumps(_plain(document), ensure_ascii=False))


def show(*parts: Any) -> None:
    """Print lines of text, as long as they are, and tables, as wide as the terminal."""
    console = from_rich("console").Console(highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def escape(text: object) -> str:
    """Text as it is, brackets too, for :func:`show`."""
    escaped: str = from_rich("markup").escape(str(text))
    return escaped


def table(first: str, *columns: str) -> Table:
    """A table whose ``first`` column is text and whose others hold numbers."""
    made: Table = from_rich("table").Table(box=from_rich("box").SIMPLE_HEAD, pad_edge=False)
    made.add_column(first, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def grid(columns: int) -> Table:
    """Columns of text without lines; the last one wraps."""
    made: Table = from_rich("table").Table.grid(padding=(0, 2))
    for column in range(columns):
        made.add_column(no_wrap=column < columns - 1)
    return made


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar, where standard error is a terminal.

    ``total`` is the number of items, where they do not say it.
    """
    if not sys.stderr.isatty():
        return items
    tracked: Iterable[T] = from_rich("progress").track(
        items, what, total, console=from_rich("console").Console(stderr=True), transient=True
    )
    return tracked


def from_rich(module: str) -> Any:
    """Import a module of rich.

    Raises:
        CommandError: it is not installed.

    """
    return optional_module(f"rich.{module}")


def optional_module(name: str) -> Any:
    """Import a module that only the extra ``cli`` installs.

    Raises:
        CommandError: it is not installed.

    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise CommandError(
            f"{name.partition('.')[0]} cannot be imported ({error}), expected it for tables and "
            "plots: pip install 'moe-r3[cli]', or ask for --json."
        ) from None


def percent(share: float) -> str:
    """For example ``97.3 %``; only all is 100 %, and only nothing is 0 %."""
    if math.isnan(share):
        return "-"
    text = f"{share:.1%}"
    if text == "0.0%" and share > 0:
        text = "<0.1%"
    if text == "100.0%" and share < 1:
        text = ">99.9%"
    return text.replace("%", " %")


def counted(number: int, what: str) -> str:
    """For example ``1 file`` and ``1,200 files``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def num_bytes(count: float) -> str:
    """For example 12.6 MB, in powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def runs_of(numbers: Iterable[int]) -> list[list[int]]:
    """Ascending numbers as ``[start, stop]`` of each run without gaps; ``stop`` is behind it."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


def ranges(runs: list[list[int]], most: int = 6) -> str:
    """For example ``1-3, 7``; beyond ``most`` runs only their number."""
    shown = [str(a) if a + 1 == b else f"{a}-{b - 1}" for a, b in runs[:most]]
    return ", ".join(shown) + (f", and {len(runs) - most} more runs" if len(runs) > most else "")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value
