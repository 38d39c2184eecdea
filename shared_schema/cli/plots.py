"""Pictures of routing, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shared_schema.cli.errors import CommandError
from shared_schema.cli.terminal import optional_module
from shared_schema.statistics import Agreement, RoutingStatistics

_MOST_COLUMNS = 400
_ACCENT = "#1f6f8b"


def draw_load(path: Path, found: RoutingStatistics) -> None:
    """Heat map of the load, layers against experts, beside the imbalance of each layer."""
    plt = _pyplot()
    load = found.load / found.load.mean(1, keepdims=True)
    figure, (heat, side) = plt.subplots(
        1,
        2,
        figsize=(11, _height(len(load))),
        width_ratios=(5, 1),
        sharey=True,
        layout="constrained",
    )
    image = heat.imshow(
        np.log2(load, where=load > 0, out=np.full(load.shape, np.nan)),
        cmap=plt.get_cmap("RdBu_r").with_extremes(bad="black"),
        vmin=-3,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=heat, extend="both", ticks=range(-3, 4), pad=0.01)
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.set_label("load / mean")
    heat.set(
        title=f"Load of the experts over {found.num_rows:,} rows (black: never chosen)",
        xlabel="expert",
        ylabel="decoder layer",
    )
    _label_layers(heat, found.layout.moe_layers)
    side.plot(found.imbalance, np.arange(len(load)), ".-", color=_ACCENT)
    side.set(title="busiest / mean", xlim=(1, None))
    side.grid(alpha=0.3)
    _save(plt, figure, path)


def draw_agreement(path: Path, found: Agreement) -> None:
    """Heat map of the choices that differ, layers against positions, with both margins."""
    plt = _pyplot()
    differs = ~found.same_set
    edges, by_part = _share_by_part(found)
    layers = np.arange(differs.shape[1] + 1) - 0.5
    figure, ((top, corner), (heat, side)) = plt.subplots(
        2,
        2,
        figsize=(11, 2 + _height(differs.shape[1])),
        width_ratios=(5, 1),
        height_ratios=(1.6, _height(differs.shape[1])),
        layout="constrained",
    )
    image = heat.pcolormesh(
        edges, layers, by_part.T, cmap="Reds", vmin=0, vmax=np.nanmax(by_part) or 1
    )
    heat.set(
        xlabel="position (grey: not recorded in both)",
        ylabel="decoder layer",
        ylim=(layers[-1], layers[0]),
        facecolor="lightgrey",
    )
    _label_layers(heat, found.layout.moe_layers)
    top.stairs(100 * by_part.mean(1), edges, color=_ACCENT, fill=True, alpha=0.6)
    top.set(
        title=f"Choices that differ: {differs.mean():.2%} of {differs.size:,}",
        ylabel="% of the layers",
        xlim=(edges[0], edges[-1]),
        ylim=(0, None),
    )
    top.sharex(heat)
    side.barh(layers[:-1] + 0.5, 100 * differs.mean(0), color=_ACCENT, alpha=0.6)
    side.set(xlabel="% of the rows", ylim=(layers[-1], layers[0]), xlim=(0, None))
    side.tick_params(labelleft=False)
    for axes in (top, side):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    corner.axis("off")
    figure.colorbar(image, ax=corner, location="left", fraction=0.5, label="share that differs")
    _save(plt, figure, path)


def _share_by_part(found: Agreement) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Edges ``[M + 1]`` of M equal parts of the positions, and ``[M, L]`` what differs in each.

    Parts without a compared row are NaN.
    """
    first, last = int(found.positions[0]), int(found.positions[-1])
    edges = np.linspace(first, last + 1, min(last + 1 - first, _MOST_COLUMNS) + 1)
    part_of_row = np.searchsorted(edges, found.positions, side="right") - 1
    rows_of_part = np.bincount(part_of_row, minlength=len(edges) - 1)
    share = np.full((len(rows_of_part), found.same_set.shape[1]), np.nan)
    begins = np.flatnonzero(np.diff(part_of_row, prepend=-1))
    sums = np.add.reduceat(~found.same_set, begins, dtype=np.int64)
    share[rows_of_part > 0] = sums / rows_of_part[rows_of_part > 0, None]
    return edges, share


def _height(num_layers: int) -> float:
    return min(max(2.5, 0.16 * num_layers), 12) + 1


def _label_layers(axes: Any, moe_layers: tuple[int, ...]) -> None:
    step = -(-len(moe_layers) // 32)
    axes.set_yticks(range(0, len(moe_layers), step), [str(i) for i in moe_layers[::step]])


def _pyplot() -> Any:
    plt = optional_module("matplotlib.pyplot")
    plt.switch_backend("Agg")
    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise CommandError(
            f"cannot write {path} ({error.strerror}), expected a place for a PNG: check the path."
        ) from None
    finally:
        plt.close(figure)
