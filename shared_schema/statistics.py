"""How routing looks: load of the experts, entropy, what neighbouring tokens share, agreement.

Only recorded rows count. Layer axes are those of the layout: MoE layers, ascending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt

from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts

_ROWS_AT_ONCE = 4096
_ROWS_OF_A_SHIFT = 1024


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """What :func:`routing_statistics` found in N recorded rows.

    Attributes:
        layout: of all samples.
        num_rows: N.
        load: ``[L, E]`` how often each expert was chosen; each layer sums to N k.
        coded_bits: ``[L]`` bits of all ids of the layer under a code that knows ``load`` and
            nothing else: the first slot is drawn in proportion to the load, each further one
            among the experts that are left.
        num_pairs: P, pairs of consecutive positions with both rows recorded.
        shared: ``[L]`` experts that the later of a pair shares with the earlier, over all pairs.

    """

    layout: RoutingLayout
    num_rows: int
    load: Int64[np.ndarray, "L E"]
    coded_bits: Float64[np.ndarray, " L"]
    num_pairs: int
    shared: Int64[np.ndarray, " L"]

    @property
    def imbalance(self) -> Float64[np.ndarray, " L"]:
        """Load of the busiest expert over the mean load: 1 when even, at most E / k."""
        return np.asarray(self.load.max(1) / self.load.mean(1))

    @property
    def unused(self) -> Int64[np.ndarray, " L"]:
        """Experts that no row chose."""
        return np.asarray((self.load == 0).sum(1))

    @property
    def load_entropy(self) -> Float64[np.ndarray, " L"]:
        """Shannon entropy of the load, bits: log2 E when even."""
        share = self.load / self.load.sum(1, keepdims=True)
        return np.asarray(
            -(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum(1)
        )

    @property
    def bits_per_id(self) -> Float64[np.ndarray, " L"]:
        """``coded_bits`` for each id, the order of the slots kept.

        An upper bound of the entropy. It is :func:`even_bits_per_id` when all experts are equally
        likely, and too low where rows are few beside E, since the load is that of the same rows.
        """
        return self.coded_bits / (self.num_rows * self.layout.top_k)

    @property
    def set_bits_per_id(self) -> Float64[np.ndarray, " L"]:
        """The same with the order of the slots dropped, ``log2 k!`` bits less for each row."""
        order = math.log2(math.factorial(self.layout.top_k)) / self.layout.top_k
        return np.maximum(self.bits_per_id - order, 0)

    @property
    def shared_with_previous(self) -> Float64[np.ndarray, " L"]:
        """Share of a token's k experts that the token before it used too; NaN without pairs."""
        if not self.num_pairs:
            return np.full(len(self.shared), np.nan)
        return self.shared / (self.num_pairs * self.layout.top_k)

    @property
    def shared_by_chance(self) -> Float64[np.ndarray, " L"]:
        """What two rows drawn independently under this load share on average."""
        likely = self.load / self.num_rows
        return np.asarray((likely**2).sum(1) / self.layout.top_k)


def even_bits_per_id(layout: RoutingLayout, *, ordered: bool = True) -> float:
    """Bits for each id when every choice of k distinct experts is equally likely.

    ``log2(E! / (E - k)!) / k`` with the order of the slots, ``log2(C(E, k)) / k`` without.
    """
    count = math.perm if ordered else math.comb
    return math.log2(count(layout.num_experts, layout.top_k)) / layout.top_k


def routing_statistics(
    samples: Sequence[RoutedExperts],
    track: Callable[[Sequence[RoutedExperts]], Iterable[RoutedExperts]] = iter,
) -> RoutingStatistics:
    """Statistics over all recorded rows of ``samples``.

    ``track`` wraps each of the two passes over the samples, with a progress bar say.

    Raises:
        RoutingSchemaError: samples of different models, or no recorded row in any.

    """
    if not samples:
        raise RoutingSchemaError("no samples, expected at least one: pass routed experts.")
    layout = samples[0].layout
    load = np.zeros((layout.num_moe_layers, layout.num_experts), np.int64)
    shared = np.zeros(layout.num_moe_layers, np.int64)
    num_rows = num_pairs = 0
    for index, sample in enumerate(track(samples)):
        layout.require_same(sample.layout, f"sample {index}")
        recorded = sample.recorded
        load += expert_load(sample)
        num_rows += int(recorded.sum())
        pairs = recorded[1:] & recorded[:-1]
        num_pairs += int(pairs.sum())
        shared += num_shared(sample.ids[1:][pairs], sample.ids[:-1][pairs]).sum(0)
    if not num_rows:
        raise RoutingSchemaError(
            "no row is recorded, expected at least one: the status of the rows says why."
        )
    coded_bits = np.zeros(layout.num_moe_layers)
    for sample in track(samples):
        coded_bits += _coded_bits(sample, load)
    return RoutingStatistics(layout, num_rows, load, coded_bits, num_pairs, shared)


def expert_load(routed: RoutedExperts) -> Int64[np.ndarray, "L E"]:
    """How often each expert was chosen, over the recorded rows."""
    ids = routed.ids[routed.recorded]
    num_experts = routed.layout.num_experts
    return np.stack(
        [np.bincount(ids[:, i].ravel(), minlength=num_experts) for i in range(ids.shape[1])]
    )


def num_shared(
    a: UInt[np.ndarray, "N L k"], b: UInt[np.ndarray, "N L k"]
) -> Int64[np.ndarray, "N L"]:
    """How many experts two arrays of valid ids share, row by row and layer by layer."""
    top_k = a.shape[-1]
    shared = np.zeros(a.shape[:2], np.int64)
    for first in range(0, len(a), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        for distance in range(top_k):
            shared[rows] += (a[rows] == np.roll(b[rows], distance, -1)).sum(-1)
    return shared


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two routings of the same sequences, compared at the N rows that both recorded.

    Attributes:
        layout: of both.
        positions: ``[N]`` int64 position of each row in its sequence, ascending.
        shared: ``[N, L]`` experts in common, 0 … k.
        same_order: ``[N, L]`` whether all k slots hold the same expert.

    """

    layout: RoutingLayout
    positions: Int64[np.ndarray, " N"]
    shared: Int64[np.ndarray, "N L"]
    same_order: Bool[np.ndarray, "N L"]

    @property
    def same_set(self) -> Bool[np.ndarray, "N L"]:
        """Whether the k experts are the same, in any order."""
        return np.asarray(self.shared == self.layout.top_k)

    @classmethod
    def concat(cls, parts: Sequence[Agreement]) -> Agreement:
        """The rows of several sequences together, ordered by position."""
        positions = np.concatenate([part.positions for part in parts])
        order = np.argsort(positions, kind="stable")
        return cls(
            parts[0].layout,
            positions[order],
            np.concatenate([part.shared for part in parts])[order],
            np.concatenate([part.same_order for part in parts])[order],
        )


def agreement(a: RoutedExperts, b: RoutedExperts) -> Agreement:
    """Compare two routings of the same tokens; :meth:`Agreement.same_set` is the usual measure.

    Raises:
        RoutingSchemaError: different models, or no position that both recorded.

    """
    a.layout.require_same(b.layout, "the second routing")
    at_a, at_b = _common_rows(a, b)
    if not len(at_a):
        raise RoutingSchemaError(
            f"the routings hold {_extent(a)} and {_extent(b)}, expected positions that both "
            "recorded: check token_start, and the status of the rows."
        )
    ids_a, ids_b = a.ids[at_a], b.ids[at_b]
    return Agreement(
        a.layout,
        a.token_start + at_a,
        num_shared(ids_a, ids_b),
        np.asarray((ids_a == ids_b).all(-1)),
    )


def shifted_agreement(
    a: RoutedExperts, b: RoutedExperts, max_rows: int = 2, max_layers: int = 1
) -> dict[tuple[int, int], float]:
    """Share of equal sets when ``b`` is taken to be wrong by some rows and MoE layers.

    Real routings that agree best when shifted are off by one somewhere. Looks at up to 1,024
    positions of each shift.

    Returns:
        the share by ``(rows, layers)``: the row of ``b`` at position p is compared with that of
        ``a`` at ``p + rows``, its layer i with layer ``i + layers``. Shifts without anything in
        common are left out.

    """
    a.layout.require_same(b.layout, "the second routing")
    num_layers = a.layout.num_moe_layers
    found = {}
    for rows in range(-max_rows, max_rows + 1):
        at_a, at_b = _common_rows(a, b, rows)
        at_a, at_b = at_a[:_ROWS_OF_A_SHIFT], at_b[:_ROWS_OF_A_SHIFT]
        for layers in range(-min(max_layers, num_layers - 1), min(max_layers, num_layers - 1) + 1):
            if len(at_a):
                of_a = slice(max(0, layers), num_layers + min(0, layers))
                of_b = slice(max(0, -layers), num_layers + min(0, -layers))
                shared = num_shared(a.ids[at_a, of_a], b.ids[at_b, of_b])
                found[rows, layers] = float((shared == a.layout.top_k).mean())
    return found


def _common_rows(
    a: RoutedExperts, b: RoutedExperts, shift: int = 0
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """Rows of ``a`` and of ``b``, moved by ``shift``, that are at one position and recorded."""
    begin_b = b.token_start + shift
    positions = np.arange(
        max(a.token_start, begin_b), max(0, min(a.token_stop, b.token_stop + shift))
    )
    at_a, at_b = positions - a.token_start, positions - begin_b
    both = a.recorded[at_a] & b.recorded[at_b]
    return at_a[both], at_b[both]


def _extent(routed: RoutedExperts) -> str:
    if not len(routed):
        return "no rows"
    return (
        f"positions {routed.token_start} … {routed.token_stop - 1} "
        f"({int(routed.recorded.sum())} recorded)"
    )


def _coded_bits(routed: RoutedExperts, load: Int64[np.ndarray, "L E"]) -> Float64[np.ndarray, " L"]:
    ids = routed.ids[routed.recorded]
    bits = np.zeros(ids.shape[1])
    for layer in range(ids.shape[1]):
        likely: Any = (load[layer] / load[layer].sum())[ids[:, layer]]
        left = np.maximum(1 - (likely.cumsum(1) - likely), likely)
        bits[layer] = np.log2(left / likely).sum()
    return bits
