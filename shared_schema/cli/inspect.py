"""Show what files of routed experts hold.

Layout, rows, where they came from, how many are recorded and why others are not, and what a row
costs beside other ways to write it. A file that cannot be read, or whose checksum or rows are
wrong, is an error; the others are shown all the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_schema.cli.errors import CommandError
from shared_schema.cli.files import add_reading_arguments, layout_of, read_one
from shared_schema.cli.terminal import (
    escape,
    num_bytes,
    percent,
    print_json,
    ranges,
    runs_of,
    show,
    table,
    track,
)
from shared_schema.routed_experts import RoutedExperts, RowStatus
from shared_schema.statistics import even_bits_per_id, routing_statistics

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = """\
examples:
  r3 inspect rollout/000.safetensors
  r3 inspect --json rollout/*.safetensors
  r3 inspect --from vllm --layout Qwen3-30B-A3B/config.json answer.b64

sizes:
  packed         ceil(log2 E) bits for each id
  load entropy   each id drawn from the load of this file's experts, none twice
  even choice    log2(E! / (E - k)!) bits for each row and layer
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``r3 inspect``."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows of one sequence")
    add_reading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show every file; 1 if one could not be read."""
    layout = layout_of(arguments)
    found: list[dict[str, Any]] = []
    for path in track(arguments.files, "reading"):
        try:
            found.append(describe(path, read_one(path, arguments, layout)))
        except CommandError as error:
            found.append({"file": str(path), "error": str(error)})
    if arguments.json:
        print_json({"files": found})
    else:
        for description in found:
            if "error" in description:
                print(f"r3 inspect: {description['error']}", file=sys.stderr)
            else:
                _show(description)
    return int(any("error" in description for description in found))


def describe(path: Path, routed: RoutedExperts) -> dict[str, Any]:
    """What ``--json`` says of one file."""
    layout = routed.layout
    status = np.asarray(routed.status)
    recorded = int(routed.recorded.sum())
    repeated = routed.recorded[1:] & routed.recorded[:-1]
    repeated &= (routed.ids[1:] == routed.ids[:-1]).all((1, 2))
    return {
        "file": str(path),
        "layout": layout.to_dict(),
        "dtype": layout.dtype.name,
        "token_start": routed.token_start,
        "token_stop": routed.token_stop,
        "rows": len(routed),
        "recorded_rows": recorded,
        "unrecorded_rows": {
            reason.name: runs_of((np.flatnonzero(status == reason) + routed.token_start).tolist())
            for reason in RowStatus
            if reason and (status == reason).any()
        },
        "repeated_rows": int(repeated.sum()),
        "spans": [span._asdict() for span in routed.spans],
        "bytes": _sizes(path, routed),
    }


def _sizes(path: Path, routed: RoutedExperts) -> dict[str, float]:
    layout = routed.layout
    ids = len(routed) * layout.num_moe_layers * layout.top_k
    sizes = {
        "file": path.stat().st_size,
        "raw": len(routed) * layout.row_nbytes,
        "packed": -(-ids * max(1, (layout.num_experts - 1).bit_length()) // 8),
        "even_choice": ids * even_bits_per_id(layout) / 8,
    }
    if routed.recorded.any():
        statistics = routing_statistics([routed])
        sizes["load_entropy"] = (
            float(statistics.coded_bits.sum()) / statistics.num_rows * len(routed) / 8
        )
    return sizes


def _show(found: dict[str, Any]) -> None:
    layout, rows, recorded = found["layout"], found["rows"], found["recorded_rows"]
    moe_layers = layout["moe_layers"]
    lines = [
        f"[bold]{escape(found['file'])}[/bold]",
        f"  model     E {layout['num_experts']}, k {layout['top_k']}, {len(moe_layers)} MoE layers "
        f"({ranges(runs_of(moe_layers))}) of {layout['num_hidden_layers']}, "
        f"ids in {found['dtype']}",
        f"  rows      {rows:,}",
        f"  recorded  {recorded:,} ({percent(recorded / rows if rows else 1)})",
    ]
    if rows:
        lines[2] += f", positions {found['token_start']} … {found['token_stop'] - 1}"
    for reason, runs in found["unrecorded_rows"].items():
        number = sum(stop - start for start, stop in runs)
        lines.append(f"  [yellow]missing[/yellow]   {number:,} {reason} at {ranges(runs)}")
    if found["repeated_rows"]:
        lines.append(
            f"  [yellow]repeated[/yellow]  {found['repeated_rows']:,} (same as the row before in "
            "every layer and slot)"
        )
    for span in found["spans"]:
        version = span["weight_version"]
        weights = "weight version unknown" if version is None else f"weights {escape(version)}"
        lines.append(
            f"  origin    {span['start']} … {span['stop'] - 1}: {span['source']}, {weights}"
        )
    show(*lines, *([_size_table(found)] if rows else ()))


def _size_table(found: dict[str, Any]) -> Table:
    sizes = table("  size", "", "bytes a row", "of raw")
    for key, name in {
        "file": "this file",
        "raw": f"raw {found['dtype']}",
        "packed": "packed",
        "load_entropy": "load entropy",
        "even_choice": "even choice",
    }.items():
        size = found["bytes"].get(key)
        if size is not None:
            sizes.add_row(
                f"  {name}",
                num_bytes(size),
                f"{size / found['rows']:,.1f}",
                f"{size / found['bytes']['raw']:.0%}",
            )
    return sizes
