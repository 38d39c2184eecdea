"""The sequences in the golden files, by file name; ``python -m tests.schema.golden_cases`` writes
files that do not exist yet. Those that exist are frozen with version 1."""

from pathlib import Path

import numpy as np

from shared_schema import RoutedExperts, RoutingLayout, RowStatus, Source, Span, encode

FOLDER = Path(__file__).parent / "golden"


def _ids(rows, layout):
    """Row t, layer l, slot s: expert (5 t + 3 l + 7 s + t·l) modulo E, for E prime to 7."""
    t, layer, slot = np.ogrid[:rows, : layout.num_moe_layers, : layout.top_k]
    return ((5 * t + 3 * layer + 7 * slot + t * layer) % layout.num_experts).astype(layout.dtype)


def _sequence(experts, top_k, layers, rows, *, start=0, status=None, spans=()):
    layout = RoutingLayout(experts, top_k, tuple(layers), max(layers) + 1)
    return RoutedExperts(_ids(rows, layout), layout, start, status, spans)


def _status(rows, reasons):
    status = np.zeros(rows, np.uint8)
    for row, reason in reasons.items():
        status[row] = reason
    return status


CASES = {
    "raw_uint8_256_experts": (_sequence(256, 8, (3, 4, 5), 5), True),
    "raw_uint8_128_experts": (_sequence(128, 8, (0, 1), 5), False),
    "raw_uint16_384_experts": (_sequence(384, 8, (1, 2), 5), False),
    "packed_1_bit": (_sequence(2, 1, (0,), 11), True),
    "packed_3_bits": (_sequence(8, 2, (0, 1), 5), True),
    "packed_7_bits": (_sequence(128, 8, (0, 1, 2), 50), True),
    "packed_9_bits": (_sequence(384, 8, (1, 2), 50), True),
    "packed_10_bits": (_sequence(1000, 3, (0, 2), 21), True),
    "packed_15_bits": (_sequence(20_000, 3, (0, 1), 21), True),
    "spans": (
        _sequence(
            32,
            4,
            (1, 2),
            6,
            start=3,
            spans=(Span(3, 5, Source.ROLLOUT, "späť 7"), Span(5, 9, Source.TRAINER)),
        ),
        True,
    ),
    "suffix": (
        _sequence(128, 8, (0, 1), 9, start=2, status=_status(9, dict.fromkeys(range(6), 1))),
        True,
    ),
    "suffix_raw_reasons_differ": (
        _sequence(384, 8, (0, 1), 4, status=_status(4, {0: 1, 1: RowStatus.EVICTED})),
        False,
    ),
    "bitmap": (_sequence(128, 8, (0, 1), 11, status=_status(11, {2: 3, 10: 3})), True),
    "bitmap_raw_reasons_differ": (
        _sequence(256, 8, (0, 1), 11, status=_status(11, {2: 3, 5: 4, 10: 6})),
        False,
    ),
    "nothing_recorded": (_sequence(64, 4, (0, 1), 3, status=_status(3, {0: 7, 1: 7, 2: 7})), True),
    "no_rows": (_sequence(128, 8, (0, 1), 0, start=4), True),
}


def golden(name):
    """The bytes of a golden file."""
    return (FOLDER / f"{name}.safetensors").read_bytes()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case, (sequence, packed) in CASES.items():
        path = FOLDER / f"{case}.safetensors"
        if not path.exists():
            path.write_bytes(encode(sequence, packed=packed))
