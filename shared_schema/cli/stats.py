"""Show how routing is spread over experts and tokens.

Over all recorded rows of all files together, for each MoE layer: how evenly experts are used, what
an id costs in bits, and how much a token shares with the one before it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from shared_schema.cli.files import add_reading_arguments, read_all
from shared_schema.cli.terminal import counted, percent, print_json, show, table, track
from shared_schema.statistics import RoutingStatistics, even_bits_per_id, routing_statistics

EPILOG = """\
examples:
  r3 stats rollout/*.safetensors
  r3 stats rollout/*.safetensors --plot load.png

columns:
  busiest    the expert with the largest load
  max/mean   its load over the mean load: 1 is even
  unused     experts that no row chose
  entropy    of the load, in bits; log2 E is even
  bits/id    to write an id when the load is known, see `r3 inspect --help`
  shared     experts of a token that the token before it used too
  chance     what two independent tokens under this load share
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``r3 stats``."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows of one sequence")
    add_reading_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw layers against experts")


def run(arguments: argparse.Namespace) -> int:
    """Show the statistics of all files."""
    samples = read_all(arguments.files, arguments)
    for path, sample in zip(arguments.files, samples, strict=True):
        samples[0].layout.require_same(sample.layout, str(path))
    found = routing_statistics(samples, lambda s: track(s, "counting"))
    if arguments.plot is not None:
        from shared_schema.cli.plots import draw_load

        draw_load(arguments.plot, found)
    if arguments.json:
        print_json(_document(arguments.files, found))
    else:
        _show(len(samples), found)
    return 0


def _document(files: list[Path], found: RoutingStatistics) -> dict[str, Any]:
    layout = found.layout
    return {
        "files": [str(path) for path in files],
        "layout": layout.to_dict(),
        "rows": found.num_rows,
        "pairs": found.num_pairs,
        "even": {
            "entropy": math.log2(layout.num_experts),
            "bits_per_id": even_bits_per_id(layout),
            "set_bits_per_id": even_bits_per_id(layout, ordered=False),
        },
        "layers": [
            {
                "layer": layer,
                "load": found.load[i],
                "busiest_expert": found.load[i].argmax(),
                "imbalance": found.imbalance[i],
                "unused_experts": found.unused[i],
                "entropy": found.load_entropy[i],
                "bits_per_id": found.bits_per_id[i],
                "set_bits_per_id": found.set_bits_per_id[i],
                "shared_with_previous": found.shared_with_previous[i],
                "shared_by_chance": found.shared_by_chance[i],
            }
            for i, layer in enumerate(layout.moe_layers)
        ],
    }


def _show(num_files: int, found: RoutingStatistics) -> None:
    layout = found.layout
    rows = table("layer", "busiest", "max/mean", "unused", "entropy", "bits/id", "shared", "chance")
    for i, layer in enumerate(layout.moe_layers):
        rows.add_row(
            str(layer),
            str(found.load[i].argmax()),
            f"{found.imbalance[i]:.2f}",
            str(found.unused[i]),
            f"{found.load_entropy[i]:.2f}",
            f"{found.bits_per_id[i]:.2f}",
            percent(found.shared_with_previous[i]),
            percent(found.shared_by_chance[i]),
        )
    rows.add_section()
    rows.add_row(
        "even",
        "",
        "1.00",
        "0",
        f"{math.log2(layout.num_experts):.2f}",
        f"{even_bits_per_id(layout):.2f}",
        "",
        percent(layout.top_k / layout.num_experts),
    )
    show(
        f"{counted(found.num_rows, 'recorded row')} of {counted(num_files, 'file')}; "
        f"E {layout.num_experts}, k {layout.top_k}, "
        f"{counted(layout.num_moe_layers, 'MoE layer')}",
        rows,
    )
