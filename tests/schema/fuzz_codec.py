"""Mutated payloads: each decodes to the same rows or raises our error, within the limits.

    python -m tests.schema.fuzz_codec --payloads 200000

Blind mutations change bytes; what still decodes must be the sequence that was written. Informed
ones change the header and make the checksum right again, as a hostile writer would; what decodes
must be valid, survive a round trip, and read the same by the decoder that was written from the page
alone.
"""

import argparse
import itertools
import json
import random
import sys
import time
import tracemalloc
from collections import Counter

import xxhash

from shared_schema import RoutedExperts, RoutingSchemaError, decode, encode
from tests.schema.golden_cases import CASES, FOLDER
from tests.schema.page_decoder import read_page

MAX_BYTES = 1 << 18
MOST_ALLOCATED = 1 << 21
"""Of one decode: its limit of ids, what parsing and checking need, the interpreter's own."""
FORBIDDEN_EVENTS = (
    "compile",
    "ctypes",
    "exec",
    "import",
    "marshal",
    "open",
    "os.",
    "pickle",
    "socket",
    "subprocess",
)
HOSTILE = [  # tuples become JSON lists
    *(None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31, 2**53 - 1, 2**53, 2**63, 10**30),
    *(1.5, 1e308, float("nan"), float("inf"), "", "all", "suffix", "bitmap", "U8", "U16", "F32"),
    *((), {}, (0, 1), ((0, 1, "rollout", None),), ((),), "\ud800", "9" * 5000, (0,) * 3000),
]


class Watch:
    """Counts what must not happen while a payload is decoded."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event, args):
        if self.on and event.startswith(FORBIDDEN_EVENTS):
            self.seen.append(event)


WATCH = Watch()


def mutated_bytes(rng, payload, others):
    """``payload`` with some bytes changed, cut, repeated, or taken from another payload."""
    data = bytearray(payload)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del data[at : at + rng.randrange(1, 9)]
        else:
            other = rng.choice(others)
            begin = rng.randrange(len(other))
            data[at : at + 16] = other[begin : begin + 16]
    return bytes(data)


def mutated_header(rng, payload):
    """``payload`` with values of its header or data replaced, under a checksum that fits."""
    length = int.from_bytes(payload[:8], "little")
    header, data = json.loads(payload[8 : 8 + length]), bytearray(payload[8 + length :])
    metadata = header.pop("__metadata__")
    fields = json.loads(metadata["moe_r3"])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if data and rng.random() < 0.3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            _replace_one(rng, rng.choice([tree for tree in (fields, header) if tree]))
    meta = json.dumps(fields)
    metadata["moe_r3"] = meta
    covered = meta.encode("utf-8", "surrogatepass") + data
    metadata["xxh3_64"] = xxhash.xxh3_64(covered).hexdigest()
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _replace_one(rng, tree):
    while True:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.7:
            tree = tree[key]
            continue
        if rng.random() < 0.1:
            del tree[key]
        elif isinstance(tree[key], int) and rng.random() < 0.5:
            tree[key] += rng.choice([-8, -1, 1, 8])
        else:
            tree[key] = rng.choice(HOSTILE)
        return


def check(payload, original):
    """Decode ``payload``; ``original`` is what it must be, or ``None``. Return what happened."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    WATCH.on = True
    try:
        routed = decode(payload, max_bytes=MAX_BYTES)
    except RoutingSchemaError as error:
        routed, message = None, str(error)
    finally:
        WATCH.on = False
        peak = tracemalloc.get_traced_memory()[1] - before
    assert not WATCH.seen, f"decoding caused {WATCH.seen}"
    assert peak <= MOST_ALLOCATED + 64 * len(payload), f"{peak} bytes for {len(payload)}"
    if routed is None:
        assert len(message) < 3000, "an error repeats the payload"
        return "refused"
    if original is not None:
        assert routed == original, "other rows"
        return "same rows"
    again = RoutedExperts(
        routed.ids, routed.layout, routed.token_start, routed.status, routed.spans
    )
    assert again == routed == decode(encode(routed)), "an invalid or unstable sequence"
    _, rows, why = read_page(payload)
    expected = zip(routed.ids.tolist(), routed.status.tolist(), strict=True)
    for (position, ids), (own, status) in zip(rows.items(), expected, strict=True):
        assert why.get(position, 0) == status, "another reason than the page's"
        assert ids == (own if status == 0 else None), "other rows than the page's"
    return "valid rows"


def fuzz(payloads, seed=0):
    """Check ``payloads`` mutations; returns how many ended in which way."""
    rng = random.Random(seed)
    originals = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("*.safetensors"))}
    sequences = {name: decode(payload) for name, payload in originals.items()}
    for (routed, _), packed in itertools.product(CASES.values(), (True, False)):
        name = f"{len(originals)}"
        originals[name], sequences[name] = encode(routed, packed=packed), routed
    outcomes = Counter()
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    for number in range(payloads):
        name = rng.choice(list(originals))
        blind = number % 2 == 0
        payload = (
            mutated_bytes(rng, originals[name], list(originals.values()))
            if blind
            else mutated_header(rng, originals[name])
        )
        try:
            outcomes[check(payload, sequences[name] if blind else None)] += 1
        except Exception as error:
            error.add_note(f"payload {number} of seed {seed}, from {name}: {payload!r}")
            raise
    if started:
        tracemalloc.stop()
    return outcomes


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.schema.fuzz_codec")
    parser.add_argument("--payloads", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    outcomes = fuzz(options.payloads, options.seed)
    print(f"{options.payloads} payloads in {time.monotonic() - begin:.0f} s: {dict(outcomes)}")


if __name__ == "__main__":
    main()
