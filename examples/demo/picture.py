"""The picture: log-prob differences without and with replay, and agreement of each layer."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

STYLES: dict[str, dict[str, Any]] = {
    "native": {"label": "native routing", "color": "#c44e52"},
    "replayed": {"label": "R3 replay", "color": "#1f6f8b"},
    "self": {"label": "trainer against itself, in other batches", "color": "#9a9a9a"},
}
SMALLEST_SHOWN = 1e-3


def draw(
    path: Path,
    differences: dict[str, Float[np.ndarray, " sampled"]],
    decisions: dict[str, Bool[np.ndarray, "tokens L"]],
    layers: Int[np.ndarray, " L"],
) -> None:
    """Write the PNG.

    Args:
        path: of the PNG.
        differences: log-prob differences in nats by comparison, `native`, `replayed`, `self`.
        decisions: true where the sets of experts differ, by comparison.
        layers: 0-based decoder layer of each column of `decisions`.

    """
    plt.switch_backend("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _draw_differences(left, differences)
    _draw_agreement(right, decisions, layers)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_differences(axes: Axes, differences: dict[str, np.ndarray]) -> None:
    """Draw the share of tokens beyond each size: importance ratios suffer from the tail."""
    for name, style in STYLES.items():
        sizes = np.sort(np.abs(differences[name]))
        share = 1 - np.arange(len(sizes)) / len(sizes)
        axes.plot(sizes, share, linewidth=2, **style)
    largest = max(np.abs(values).max() for values in differences.values())
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(SMALLEST_SHOWN, 1.3 * max(largest, 2 * SMALLEST_SHOWN)),
        xlabel="log-prob difference (nats)",
        ylabel="sampled tokens at least that far apart",
        title="Log-probs: trainer against rollout",
    )
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")


def _draw_agreement(axes: Axes, decisions: dict[str, np.ndarray], layers: np.ndarray) -> None:
    for name, style in STYLES.items():
        axes.plot(layers, 1 - decisions[name].mean(0), "o-", linewidth=2, markersize=7, **style)
    axes.set(
        xticks=layers,
        xlabel="decoder layer",
        ylabel="router decisions with the same experts",
        title="Agreement of the routers in each MoE layer",
    )
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
