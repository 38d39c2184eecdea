"""What the traces of a rollout say about routing: entropy, locality, and how small they get."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from shared_schema import RoutedExperts
from shared_schema.bit_packing import bits_per_id, packed_nbytes
from shared_schema.statistics import (
    RoutingStatistics,
    even_bits_per_id,
    num_shared,
    routing_statistics,
)

DISTANCES = (1, 2, 4, 8, 16, 32)
ZSTD_LEVELS = (3, 19)


@dataclass(frozen=True)
class Routing:
    """Figures of N recorded rows.

    Attributes:
        statistics: by layer.
        by_distance: share of a token's experts that the token so many positions before used too,
            mean over layers.
        bytes_per_token: by way of writing the ids, headers left out.

    """

    statistics: RoutingStatistics
    by_distance: dict[int, float]
    bytes_per_token: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        found, layout = self.statistics, self.statistics.layout
        return {
            "layout": layout.to_dict(),
            "rows": found.num_rows,
            "load_entropy_bits": found.load_entropy.tolist(),
            "imbalance": found.imbalance.tolist(),
            "bits_per_id": found.bits_per_id.tolist(),
            "even_bits_per_id": even_bits_per_id(layout),
            "set_bits_per_id": found.set_bits_per_id.tolist(),
            "even_set_bits_per_id": even_bits_per_id(layout, ordered=False),
            "shared_with_previous": found.shared_with_previous.tolist(),
            "shared_by_chance": found.shared_by_chance.tolist(),
            "shared_by_distance": self.by_distance,
            "bytes_per_token": self.bytes_per_token,
        }


def measure_routing(samples: Sequence[RoutedExperts]) -> Routing:
    """Measure recorded rows.

    Raises:
        RoutingSchemaError: no row is recorded.

    """
    return Routing(
        routing_statistics(samples),
        {distance: _shared_at(samples, distance) for distance in DISTANCES},
        _bytes_per_token(samples),
    )


def _shared_at(samples: Sequence[RoutedExperts], distance: int) -> float:
    shared = pairs = 0
    for sample in samples:
        both = sample.recorded[distance:] & sample.recorded[:-distance]
        later, earlier = sample.ids[distance:][both], sample.ids[:-distance][both]
        shared += int(num_shared(later, earlier).sum())
        pairs += later.size
    return shared / pairs if pairs else float("nan")


def _bytes_per_token(samples: Sequence[RoutedExperts]) -> dict[str, float]:
    parts = [s.ids[s.recorded] for s in samples]
    together = np.concatenate(parts)
    found = routing_statistics(samples)
    rows, top_k = len(together), together.shape[2]
    bits = bits_per_id(found.layout.num_experts)
    packed = sum(packed_nbytes(p.size, bits) for p in parts)
    sizes = {"raw": float(found.layout.row_nbytes), "packed": packed / rows}
    for level in ZSTD_LEVELS:
        compressor = zstandard.ZstdCompressor(level=level)

        def size(arrays: Sequence[Any], compressor: Any = compressor) -> float:
            return sum(len(compressor.compress(a.tobytes())) for a in arrays) / rows

        sizes[f"zstd {level}, by token"] = size(parts)
        sizes[f"zstd {level}, by layer"] = size([p.transpose(1, 0, 2) for p in parts])
        sizes[f"zstd {level}, by layer, all sequences at once"] = size(
            [together.transpose(1, 0, 2)]
        )
    sizes["code that knows each layer's load"] = float(found.bits_per_id.sum()) * top_k / 8
    sizes["the same, order dropped"] = float(found.set_bits_per_id.sum()) * top_k / 8
    return sizes
