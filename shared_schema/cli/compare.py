"""Say where two routings of the same tokens agree.

A and B are files of one sequence, or folders of them, in which files of the same name belong
together. Rows are matched by position; those that only one side recorded are left out. Two routings
agree in a layer when they chose the same set of experts; whether in the same order is told apart.
Exit status 1 means that a set differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_schema.cli.errors import CommandError
from shared_schema.cli.files import add_reading_arguments, read_all
from shared_schema.cli.terminal import counted, escape, percent, print_json, show, table, track
from shared_schema.errors import RoutingSchemaError
from shared_schema.formats import FORMATS
from shared_schema.routed_experts import RoutedExperts
from shared_schema.statistics import Agreement, agreement, shifted_agreement

if TYPE_CHECKING:
    from rich.table import Table

_PARTS = 12
_SEQUENCES_TO_SHIFT = 16
_CLEARLY = 0.1

EPILOG = """\
examples:
  r3 compare rollout.safetensors trainer.safetensors
  r3 compare rollout/ trainer/ --plot agreement.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``r3 compare``."""
    parser.add_argument("a", type=Path, metavar="A", help="file or folder")
    parser.add_argument("b", type=Path, metavar="B", help="file or folder")
    add_reading_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw layers against positions")


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 if any set of experts differs."""
    paths = _paths(arguments)
    a, b = (read_all(side, arguments) for side in paths)
    found = Agreement.concat(
        [_compare(*pair) for pair in track(list(zip(*paths, a, b, strict=True)), "comparing")]
    )
    shifts = _shifts(a, b)
    best = max(shifts, key=lambda shift: (shifts[shift], shift == (0, 0)))
    shifted = best != (0, 0) and shifts[best] > shifts[0, 0] + _CLEARLY
    if arguments.plot is not None:
        from shared_schema.cli.plots import draw_agreement

        draw_agreement(arguments.plot, found)
    if arguments.json:
        print_json(
            {
                "a": str(arguments.a),
                "b": str(arguments.b),
                "sequences": len(a),
                **_total(found),
                "layers": _by_layer(found),
                "positions": _by_position(found),
                "best_shift": {"rows": best[0], "layers": best[1], "same_set": shifts[best]},
            }
        )
    else:
        _show(arguments, len(a), found)
        if shifted:
            show(
                f"[yellow]B shifted by {best[0]:+d} rows and {best[1]:+d} MoE layers fits better: "
                f"{percent(shifts[best])} the same[/yellow]"
            )
    return int(not found.same_set.all())


def _compare(path_a: Path, path_b: Path, a: RoutedExperts, b: RoutedExperts) -> Agreement:
    try:
        return agreement(a, b)
    except RoutingSchemaError as error:
        raise CommandError(f"{path_a} and {path_b}: {error}") from None


def _paths(arguments: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """The files of A and those of B, in the same order."""
    a, b = arguments.a, arguments.b
    if not a.is_dir() or not b.is_dir():
        return [a], [b]
    pattern = f"*{FORMATS[arguments.source].suffix}"
    names = sorted(path.name for path in a.glob(pattern))
    others = sorted(path.name for path in b.glob(pattern))
    alone = set(names) ^ set(others)
    if alone or not names:
        raise CommandError(
            f"{a} has {len(names)} files {pattern} and {b} has {len(others)}, "
            + (f"{sorted(alone)[0]} in one alone, " if alone else "")
            + "expected files of the same names: compare files one by one, or mend the folders."
        )
    return [a / name for name in names], [b / name for name in names]


def _shifts(a: Sequence[RoutedExperts], b: Sequence[RoutedExperts]) -> dict[tuple[int, int], float]:
    """Share of equal sets by shift, the mean over the first sequences that know it."""
    found: dict[tuple[int, int], list[float]] = {}
    for one, other in zip(a[:_SEQUENCES_TO_SHIFT], b, strict=False):
        for shift, share in shifted_agreement(one, other).items():
            found.setdefault(shift, []).append(share)
    return {shift: sum(shares) / len(shares) for shift, shares in found.items()}


def _total(found: Agreement) -> dict[str, Any]:
    return {
        "rows": len(found.positions),
        "same_set": found.same_set.mean(),
        "same_order": found.same_order.mean(),
        "shared_experts": found.shared.mean() / found.layout.top_k,
        "rows_that_differ": (~found.same_set.all(1)).mean(),
    }


def _by_layer(found: Agreement) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "same_set": found.same_set[:, i].mean(),
            "same_order": found.same_order[:, i].mean(),
            "shared_experts": found.shared[:, i].mean() / found.layout.top_k,
        }
        for i, layer in enumerate(found.layout.moe_layers)
    ]


def _by_position(found: Agreement) -> list[dict[str, Any]]:
    """The positions in up to twelve parts, with all rows at them."""
    positions = np.unique(found.positions)
    parts = []
    for held in np.array_split(positions, min(len(positions), _PARTS)):
        rows = slice(*np.searchsorted(found.positions, [held[0], held[-1] + 1]))
        parts.append(
            {
                "start": int(held[0]),
                "stop": int(held[-1]) + 1,
                "rows": rows.stop - rows.start,
                "same_set": found.same_set[rows].mean(),
                "same_order": found.same_order[rows].mean(),
                "shared_experts": found.shared[rows].mean() / found.layout.top_k,
                "rows_that_differ": (~found.same_set[rows].all(1)).mean(),
            }
        )
    return parts


def _show(arguments: argparse.Namespace, num_sequences: int, found: Agreement) -> None:
    total = _total(found)
    layers = table("layer", "same set", "same order", "shared experts")
    for part in _by_layer(found):
        _add(layers, str(part["layer"]), part)
    positions = table("positions", "same set", "same order", "shared experts", "rows that differ")
    for part in _by_position(found):
        _add(positions, f"{part['start']}-{part['stop'] - 1}", part)
    show(
        f"A {escape(arguments.a)}",
        f"B {escape(arguments.b)}",
        f"{counted(total['rows'], 'row')} of {counted(num_sequences, 'sequence')} in "
        f"{counted(found.layout.num_moe_layers, 'MoE layer')}, recorded in both",
        f"the same set of experts in {percent(total['same_set'])} of the choices, "
        f"in the same order in {percent(total['same_order'])}",
        f"rows that differ in some layer: {percent(total['rows_that_differ'])}",
        layers,
        positions,
    )


def _add(to: Table, name: str, part: dict[str, Any]) -> None:
    columns = ("same_set", "same_order", "shared_experts", "rows_that_differ")
    to.add_row(name, *(percent(part[c]) for c in columns if c in part))
