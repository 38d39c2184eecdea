"""Bytes for each token and speed of the byte format beside what others send.

Ids are uniformly random, which no code can make smaller than log2 of their number: for real traces
see docs/evidence.md. Speeds are in GB/s of the ids' raw bytes in the narrow dtype, whatever a codec
makes of them, and of CPU time, so that other programs on the machine do not count. Alternatives run
interleaved, each in its fastest form: base64 by pybase64, as in vLLM.

`encode` and `decode` include the checksum, which no alternative has. Whether ids are in range and
distinct is checked by no alternative either, so it is left out of `decode` and told apart:
`checked_decode` is `decode` as it is called without options, `check` is the check alone; `pack` and
`unpack` are the bit-packing alone.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pybase64
import zstandard
from jaxtyping import UInt

from benchmarks._measure import finish, interleaved, median_interval, surroundings
from shared_schema import RoutedExperts, RoutingLayout, decode, encode, to_vllm_native
from shared_schema.bit_packing import bits_per_id, pack, packed_nbytes, unpack
from shared_schema.row_checks import invalid_rows


class Shape(NamedTuple):
    """A model's routing: hidden layers, leading dense layers, k and E."""

    hidden: int
    dense: int
    top_k: int
    experts: int


SHAPES = {
    "qwen3-30b-a3b": Shape(48, 0, 8, 128),
    "qwen3-235b": Shape(94, 0, 8, 128),
    "deepseek-v3": Shape(61, 3, 8, 256),
    "kimi-k2": Shape(61, 1, 8, 384),
    "qwen3-next": Shape(48, 0, 10, 512),
    "gpt-oss-120b": Shape(36, 0, 4, 128),
}
JSON_ROWS = 64


class Codec(NamedTuple):
    """One way to send a sequence."""

    encode: Callable[[RoutedExperts], Any]
    decode: Callable[[Any], Any]


def npy_base64(routed: RoutedExperts) -> bytes:
    """What vLLM's server sends: a `.npy` with a slot for every hidden layer."""
    buffer = io.BytesIO()
    np.save(buffer, to_vllm_native(routed))
    return pybase64.b64encode(buffer.getbuffer())


CODECS = {
    "packed": Codec(encode, lambda payload: decode(payload, check_ids=False)),
    "raw": Codec(
        lambda routed: encode(routed, packed=False),
        lambda payload: decode(payload, check_ids=False),
    ),
    "base64 .npy": Codec(
        npy_base64, lambda text: np.load(io.BytesIO(pybase64.b64decode(text, validate=True)))
    ),
    "base64 int32": Codec(
        lambda routed: pybase64.b64encode(routed.ids.astype("<i4").data.cast("B")),
        lambda text: np.frombuffer(pybase64.b64decode(text, validate=True), "<i4"),
    ),
    "zstd": Codec(
        lambda routed: zstandard.ZstdCompressor().compress(np.ascontiguousarray(routed.ids).data),
        lambda data: np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint8),
    ),
    "nested JSON": Codec(
        lambda routed: json.dumps(routed.ids.tolist()).encode(),
        lambda text: np.array(json.loads(text)),
    ),
}


def random_ids(rng: np.random.Generator, rows: int, layout: RoutingLayout) -> UInt[Any, "T L k"]:
    """Uniform choices of k distinct experts: drawn, and drawn again where an expert repeats."""
    ids = np.empty((rows * layout.num_moe_layers, layout.top_k), layout.dtype)
    again = np.arange(len(ids))
    while len(again):
        drawn = rng.integers(0, layout.num_experts, (len(again), layout.top_k), layout.dtype)
        ids[again] = drawn
        ascending = np.sort(drawn, axis=1)
        again = again[(ascending[:, 1:] == ascending[:, :-1]).any(1)]
    return ids.reshape(rows, layout.num_moe_layers, layout.top_k)


def _timed(function: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        begin = time.process_time()
        function()
        return time.process_time() - begin

    return run


def _parts(routed: RoutedExperts) -> dict[str, Callable[[], Any]]:
    """What encoding and decoding consist of."""
    bits = bits_per_id(routed.layout.num_experts)
    payload = encode(routed)
    parts: dict[str, Callable[[], Any]] = {
        "checked_decode": lambda: decode(payload),
        "check": lambda: invalid_rows(routed.ids, routed.layout),
    }
    if bits % 8:
        flat = routed.ids.reshape(-1)
        stream = np.zeros(packed_nbytes(flat.size, bits), np.uint8)
        parts["pack"] = lambda: pack(flat, bits, stream)
        parts["unpack"] = lambda: unpack(stream, bits, flat.size)
    return parts


def measure(shape: Shape, tokens: int, rounds: int, warm_up: int) -> dict[str, Any]:
    """Measure one shape; the alternatives are under their names."""
    layers = tuple(range(shape.dense, shape.hidden))
    layout = RoutingLayout(shape.experts, shape.top_k, layers, shape.hidden)
    routed = RoutedExperts(random_ids(np.random.default_rng(0), tokens, layout), layout)
    few = routed[: min(tokens, JSON_ROWS)]
    arms: dict[str, Callable[[], float]] = {}
    sizes, nbytes = {}, {}
    for name, codec in CODECS.items():
        sent = few if name == "nested JSON" else routed
        payload = codec.encode(sent)
        sizes[name] = len(payload) / len(sent)
        for way, function, argument in (
            ("encode", codec.encode, sent),
            ("decode", codec.decode, payload),
        ):
            arms[f"{name} {way}"] = _timed(lambda f=function, a=argument: f(a))  # type: ignore[misc]
            nbytes[f"{name} {way}"] = sent.ids.nbytes
    for name, part in _parts(routed).items():
        arms[name], nbytes[name] = _timed(part), routed.ids.nbytes
    seconds = interleaved(arms, rounds, warm_up)
    speed = {name: nbytes[name] / np.median(taken) / 1e9 for name, taken in seconds.items()}
    result: dict[str, Any] = {
        name: {
            "bytes_per_token": sizes[name],
            "encode_gb_s": float(speed[f"{name} encode"]),
            "decode_gb_s": float(speed[f"{name} decode"]),
        }
        for name in CODECS
    }
    result |= result.pop("packed")
    for way in ("encode", "decode"):
        slow, fast = median_interval(seconds[f"packed {way}"].tolist())[::-1]
        bounds = [routed.ids.nbytes / slow / 1e9, routed.ids.nbytes / fast / 1e9]
        result[f"{way}_gb_s_interval"] = bounds
    return result | {f"{part}_gb_s": float(speed[part]) for part in _parts(routed)}


def _print(results: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for way in ("bytes_per_token", "encode_gb_s", "decode_gb_s"):
        others = [name for name in CODECS if name != "packed"]
        table = Table("", "packed", *others, title=way.replace("_", " ").replace("gb s", "GB/s"))
        digits = 0 if way == "bytes_per_token" else 2
        for name, result in results.items():
            values = [result[way], *(result[other][way] for other in others)]
            table.add_row(name, *(f"{value:,.{digits}f}" for value in values))
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codec",
        description="Bytes for each token and GB/s of the byte format beside what others send.",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192, help="rows of the sequence")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    args = parser.parse_args()
    results = {
        name: measure(SHAPES[name], args.tokens, args.rounds, args.warm_up) for name in args.shapes
    }
    _print(results)
    finish(
        {
            **results,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "time": "CPU time of the process, one thread",
            **surroundings("moe-r3", "numpy", "xxhash", "pybase64", "zstandard"),
        }
    )


if __name__ == "__main__":
    main()
