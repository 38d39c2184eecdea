"""The byte format: lossless, readable by safetensors, and refused when anything is off."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_schema import (
    RoutedExperts,
    RoutingLayout,
    RoutingSchemaError,
    RowStatus,
    Source,
    Span,
    decode,
    encode,
)
from tests.schema.strategies import distinct_ids, routed_experts

LAYOUT = RoutingLayout(300, 4, (1, 2), 4)
ROUTED = RoutedExperts(
    distinct_ids(np.random.default_rng(0), 6, LAYOUT),
    LAYOUT,
    3,
    np.array([0, 0, RowStatus.EVICTED, 0, 0, 0], np.uint8),
    (Span(3, 5, Source.ROLLOUT, "step-7"), Span(5, 9, Source.TRAINER)),
)


def rewritten(change, payload=None):
    """``encode(ROUTED)`` with its metadata changed and the checksum made right again."""
    payload = encode(ROUTED) if payload is None else payload
    length = int.from_bytes(payload[:8], "little")
    header, data = json.loads(payload[8 : 8 + length]), payload[8 + length :]
    fields = json.loads(header["__metadata__"]["moe_r3"])
    change(header, fields)
    meta = json.dumps(fields)
    if "__metadata__" in header:
        header["__metadata__"] = {
            "moe_r3": meta,
            "xxh3_64": xxhash.xxh3_64(meta.encode() + data).hexdigest(),
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@given(routed_experts())
def test_what_was_encoded_is_decoded(routed):
    assert decode(encode(routed), expect=routed.layout) == routed


@given(routed_experts())
def test_safetensors_reads_the_file(routed):
    tensors = safetensors.numpy.load(encode(routed))
    assert np.array_equal(tensors["ids"], routed.ids)
    assert ("status" in tensors) == (not routed.is_complete)


def test_complete_ids_are_a_view_of_the_payload():
    payload = bytearray(encode(RoutedExperts(ROUTED.ids[:2], LAYOUT)))
    assert np.shares_memory(decode(payload).ids, np.frombuffer(payload, np.uint8))


def test_unknown_metadata_is_ignored():
    assert decode(rewritten(lambda h, f: f.update(later=[1]))) == ROUTED


def drop(key):
    return lambda h, f: f.pop(key)


def entry(**fields):
    return lambda h, f: h["ids"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, f: h.pop("__metadata__"), "no moe_r3 metadata"),
        (lambda h, f: f.update(version=2), "format version 2, expected 1: .* newer moe-r3"),
        (drop("version"), "format version None"),
        (drop("num_experts"), "lacks num_experts"),
        (lambda h, f: f.update(num_experts=200), "expected ids in uint8"),
        (lambda h, f: f.update(num_experts=257), "distinct experts below 257"),
        (lambda h, f: f.update(token_start=-1), "token_start is -1"),
        (lambda h, f: f.update(spans=[[3, 9]]), "spans is"),
        (lambda h, f: f.update(spans=7), "spans is 7"),
        (entry(dtype="F32"), "malformed"),
        (entry(shape=[6, 2, 5]), "malformed"),
        (entry(shape=[-6, -2, 4]), "malformed"),
        (entry(shape=[10**30, 2, 4]), "malformed"),
        (entry(data_offsets=[0, 2]), "malformed"),
        (entry(data_offsets=None), "malformed"),
        (lambda h, f: h.update(ids=3), "malformed"),
        (lambda h, f: h.pop("status"), "holds 102 bytes of data, expected 96"),
    ],
)
def test_a_payload_that_lies_is_refused_by_name(change, message):
    with pytest.raises(RoutingSchemaError, match=message):
        decode(rewritten(change))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "0 bytes"),
        (encode(ROUTED)[:50], "cut off"),
        (encode(ROUTED)[: len(encode(ROUTED)) // 2], "cut off"),
        (encode(ROUTED)[:-1], "cut off"),
        (encode(ROUTED) + b"x", "holds 103 bytes of data, expected 102"),
        ((1 << 40).to_bytes(8, "little") + b"x" * 99, "declares a header of"),
        ((2).to_bytes(8, "little") + b"{]", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "is a list"),
        ((60_000).to_bytes(8, "little") + b"[" * 60_000, "not JSON"),
    ],
)
def test_a_payload_cut_or_foreign_is_refused_by_name(payload, message):
    with pytest.raises(RoutingSchemaError, match=message):
        decode(payload)


def test_a_payload_of_another_model_is_refused():
    other = RoutingLayout(300, 4, (1, 3), 4)
    with pytest.raises(RoutingSchemaError, match=r"moe_layers \(1, 2\) instead of \(1, 3\)"):
        decode(encode(ROUTED), expect=other)


@settings(max_examples=500)
@given(st.data())
def test_a_changed_byte_is_noticed(data):
    payload = bytearray(encode(ROUTED))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RoutingSchemaError):
        assert decode(payload) == ROUTED  # only a byte of white space may change unnoticed


def test_a_header_that_no_reader_would_take_is_not_written():
    ids = distinct_ids(np.random.default_rng(0), 40_000, LAYOUT)
    spans = tuple(Span(i, i + 1, Source.ROLLOUT, str(i)) for i in range(40_000))
    with pytest.raises(RoutingSchemaError, match="merge some of the 40000 spans"):
        encode(RoutedExperts(ids, LAYOUT, 0, None, spans))


def test_the_example_in_the_specification_is_what_is_written():
    page = (Path(__file__).parents[2] / "FORMAT.md").read_text()
    dump = page.split("```text\n")[1].split("```")[0]
    payload = bytes.fromhex("".join(line[6:53] for line in dump.splitlines()))
    routed = RoutedExperts(np.array([[[3, 0]]], np.uint8), RoutingLayout(4, 2, (1,), 2), 2)
    assert encode(routed) == payload
    assert decode(payload) == routed
