"""The byte format: lossless, readable by others, and refused when anything is off."""

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
from shared_schema.bit_packing import bits_per_id, pack, packed_nbytes, unpack
from tests.schema.fuzz_codec import fuzz
from tests.schema.golden_cases import CASES, golden
from tests.schema.page_decoder import read_page
from tests.schema.strategies import distinct_ids, routed_experts

LAYOUT = RoutingLayout(300, 4, (1, 2), 4)
SPANS = (Span(3, 5, Source.ROLLOUT, "step-7"), Span(5, 10, Source.TRAINER))
STATUS = np.array([0, 0, RowStatus.EVICTED, 0, RowStatus.STEP_LOST, 0, 0], np.uint8)
ROUTED = RoutedExperts(distinct_ids(np.random.default_rng(0), 7, LAYOUT), LAYOUT, 3, STATUS, SPANS)
COMPLETE = RoutedExperts(ROUTED.ids[:2], LAYOUT)


def rewritten(change, payload):
    """``payload`` with its header and metadata changed and the checksum made right again."""
    length = int.from_bytes(payload[:8], "little")
    header, data = json.loads(payload[8 : 8 + length]), payload[8 + length :]
    fields = json.loads(header["__metadata__"]["moe_r3"])
    more = change(header, fields)
    data += more if isinstance(more, bytes) else b""
    meta = json.dumps(fields)
    if "__metadata__" in header:
        checksum = xxhash.xxh3_64(meta.encode() + data).hexdigest()
        header["__metadata__"] |= {"moe_r3": meta, "xxh3_64": checksum}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def later_additions(header, fields):
    fields["later"] = {"deep": [1]}
    header["__metadata__"]["producer"] = "someone"
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")
    header["logits"] = {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [end, end + 3]}
    return b"abc"


@given(routed_experts(), st.booleans())
def test_what_was_encoded_is_decoded(routed, packed):
    assert decode(encode(routed, packed=packed), expect=routed.layout) == routed


@given(routed_experts(), st.booleans())
def test_a_reader_written_from_the_page_agrees(routed, packed):
    fields, rows, why = read_page(encode(routed, packed=packed))
    assert list(rows) == list(range(routed.token_start, routed.token_stop))
    for row, (position, ids) in enumerate(rows.items()):
        assert why.get(position, 0) == routed.status[row]
        assert ids == (routed.ids[row].tolist() if routed.recorded[row] else None)
    assert [tuple(span) for span in fields["spans"]] == list(routed.spans)
    assert RoutingLayout.from_dict(fields) == routed.layout


@given(routed_experts(), st.booleans())
def test_safetensors_reads_the_file(routed, packed):
    tensors = safetensors.numpy.load(encode(routed, packed=packed))
    if "ids" in tensors:
        assert np.array_equal(tensors["ids"], routed.ids[routed.recorded])
    if "recorded" in tensors:
        bitmap = np.unpackbits(tensors["recorded"], bitorder="little")[: len(routed)]
        assert np.array_equal(bitmap, routed.recorded)


@pytest.mark.parametrize("name", CASES)
def test_golden_files_are_read_and_written_as_they_were_frozen(name):
    routed, packed = CASES[name]
    assert decode(golden(name)) == routed
    assert encode(routed, packed=packed) == golden(name)
    _, rows, _ = read_page(golden(name))
    assert [ids for ids in rows.values() if ids] == routed.ids[routed.recorded].tolist()


def test_a_later_writers_additions_are_ignored():
    assert decode(golden("from_a_later_writer")) == CASES["bitmap"][0]
    assert decode(rewritten(later_additions, encode(ROUTED))) == ROUTED


def test_the_example_in_the_specification_is_what_is_written():
    page = (Path(__file__).parents[2] / "FORMAT.md").read_text()
    dump = page.split("```text\n")[1].split("```")[0]
    payload = bytes.fromhex("".join(line[6:53] for line in dump.splitlines()))
    ids = np.array([[[3, 0]], [[0, 0]], [[1, 2]]], np.uint8)
    routed = RoutedExperts(ids, RoutingLayout(4, 2, (1,), 2), 2, np.array([0, 2, 0], np.uint8))
    assert encode(routed) == payload
    assert decode(payload) == routed


@pytest.mark.parametrize("bits", [*range(1, 8), *range(9, 16)])
def test_ids_are_packed_lowest_bit_first_at_any_width_and_length(bits):
    """A stream beyond one block of the packer, and every length near its edges."""
    rng = np.random.default_rng(bits)
    ids = rng.integers(0, 1 << bits, 300_007).astype(np.uint8 if bits < 8 else np.uint16)
    for length in [*range(90), 131_072, 131_136, 262_207, 300_007]:
        part = ids[-length:] if length else ids[:0]
        each_bit = (part[:, None] >> np.arange(bits, dtype=part.dtype)) & 1
        expected = np.packbits(each_bit.astype(np.uint8).reshape(-1), bitorder="little")
        packed = np.full(packed_nbytes(length, bits) + 9, 0xEE, np.uint8)
        pack(part, bits, packed[:-9])
        assert np.array_equal(packed[:-9], expected)
        assert (packed[-9:] == 0xEE).all(), "bytes after the stream are not touched"
        assert np.array_equal(unpack(expected, bits, length), part)


@pytest.mark.parametrize(
    ("experts", "top_k", "layers", "bytes_per_token"),
    [(128, 8, 48, 336), (384, 8, 60, 540), (256, 8, 58, 464), (64, 6, 26, 117), (8, 2, 32, 24)],
)
def test_bits_per_id_decide_the_bytes_of_a_token(experts, top_k, layers, bytes_per_token):
    layout = RoutingLayout(experts, top_k, tuple(range(layers)), layers)
    ids = np.resize(distinct_ids(np.random.default_rng(0), 8, layout), (4000, layers, top_k))
    payload = encode(RoutedExperts(ids, layout))
    assert 0 < len(payload) - 4000 * bytes_per_token < 1000, "the header vanishes"
    assert layers * top_k * bits_per_id(experts) == 8 * bytes_per_token


@pytest.mark.parametrize("experts", [128, 256, 384])
def test_raw_ids_of_a_complete_sequence_are_a_view_of_the_payload(experts):
    layout = RoutingLayout(experts, 8, (0, 1), 2)
    routed = RoutedExperts(distinct_ids(np.random.default_rng(0), 9, layout), layout)
    payload = bytearray(encode(routed, packed=False))
    assert np.shares_memory(decode(payload, max_bytes=0).ids, np.frombuffer(payload, np.uint8))


def test_unrecorded_rows_cost_nothing_if_they_share_a_reason():
    status = np.zeros(100, np.uint8)
    status[:90] = RowStatus.NOT_COMPUTED_HERE
    ids = np.resize(ROUTED.ids[0], (100, 2, 4))
    payload = encode(RoutedExperts(ids, LAYOUT, 0, status), packed=False)
    assert len(payload) % 8 == (10 * LAYOUT.row_nbytes + 1) % 8
    assert len(payload) < 450 + 10 * LAYOUT.row_nbytes


def test_a_payload_that_stands_for_too_much_is_refused_before_anything_is_allocated():
    grown = rewritten(lambda h, f: f.update(num_rows=10**12), golden("suffix"))
    with pytest.raises(RoutingSchemaError, match=r"stands for 16000000000000 bytes .* max_bytes"):
        decode(grown)
    suffix = CASES["suffix"][0]
    assert decode(golden("suffix"), max_bytes=suffix.ids.nbytes) == suffix
    with pytest.raises(RoutingSchemaError, match="expected at most 143: pass a larger max_bytes"):
        decode(golden("suffix"), max_bytes=suffix.ids.nbytes - 1)


def put(**fields):
    return lambda h, f: f.update(fields)


def drop(key):
    return lambda h, f: f.pop(key)


def entry(tensor="ids", **fields):
    return lambda h, f: h[tensor].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, f: h.pop("__metadata__"), "no moe_r3 metadata"),
        (put(version=2), "format version 2, expected 1: .* newer moe-r3"),
        (put(version=True), "format version True"),
        (put(version=1.0), r"format version 1\.0"),
        (drop("version"), "format version None"),
        (drop("num_experts"), "num_experts is None"),
        (put(num_experts=200), r"tensor ids is \['U16', .*, expected \['U8', "),
        (put(num_experts=257), "distinct experts below 257"),
        (put(num_experts=70_000), "at most 65535"),
        (put(moe_layers=[1, 2.0]), "moe_layers is .*, expected a list of integers"),
        (put(moe_layers=[2, 1]), "ascending"),
        (put(token_start=-1), "token_start is -1"),
        (put(token_start=2**53), "token_start is 9007199254740992"),
        (put(num_rows=8), r"tensor status is .*, expected \['U8', \[3\]\]"),
        (put(num_carried=6), r"tensor ids is .*, expected \['U16', \[6, 2, 4\]\]"),
        (put(selector="all"), "tensor recorded is present"),
        (put(selector="suffix"), "tensor recorded is present"),
        (lambda h, f: f.update(selector="prefix", later=h.update(x=h.pop("recorded"))), "'prefix'"),
        (put(num_carried=7), "tensor status is present"),
        (put(spans=[[3, 9]]), "spans is"),
        (put(spans=7), "spans is 7"),
        (put(spans=[]), r"spans is \[\], expected .* for 7 rows"),
        (put(spans=[[3, float("inf"), "rollout", None]]), r"spans is \[\[3, inf, "),
        (put(spans=[[3, 10.5, "rollout", None]]), r"spans is \[\[3, 10\.5, "),
        (entry(dtype="F32"), r"tensor ids is \['F32'"),
        (entry(shape=[5, 2, 5]), "tensor ids is"),
        (entry(shape=None), "tensor ids is"),
        (entry(data_offsets=[0, 2]), "expected them to begin at 2"),
        (entry(data_offsets=[0, 10**30]), "expected dtype, shape and data_offsets"),
        (entry(data_offsets=[0.0, 80]), "expected dtype, shape and data_offsets"),
        (entry(data_offsets=None), "expected dtype, shape and data_offsets"),
        (lambda h, f: h.update(ids=3), "expected dtype, shape and data_offsets"),
        (entry("status", data_offsets=[80, 83]), "data_offsets"),
        (lambda h, f: h.pop("status"), "holds 83 bytes of data, expected 81"),
        (lambda h, f: h.update(reason=h.pop("status")), "tensor status is absent"),
        (lambda h, f: h.update(packed_ids=h.pop("ids")), r"tensor packed_ids is \['U16'"),
        (lambda h, f: h.update(other=h.pop("ids")), "expected one of ids and packed_ids"),
        (lambda h, f: h.update(other=h.pop("recorded")), "tensor recorded is absent"),
    ],
)
def test_a_payload_that_lies_is_refused_by_name(change, message):
    with pytest.raises(RoutingSchemaError, match=message):
        decode(rewritten(change, encode(ROUTED, packed=False)))


@pytest.mark.parametrize(
    ("find", "replace", "message"),
    [
        (b"\x6b\x02\x03", b"\xeb\x02\x03", "selector is 'bitmap' with 5 of 7"),
        (b"\x6b\x02\x03", b"\x2b\x02\x03", "selector is 'bitmap' with 5 of 7"),
        (b"\x6b\x02\x03", b"\x6b\x02\x00", "calls a row that is not carried RECORDED"),
        (b"\x6b\x02\x03", b"\x6b\x02\x08", "newer writer"),
    ],
)
def test_a_bitmap_or_reason_that_lies_is_refused_by_name(find, replace, message):
    payload = encode(ROUTED)
    assert payload.endswith(find)
    lying = rewritten(lambda h, f: None, payload[: -len(find)] + replace)
    with pytest.raises(RoutingSchemaError, match=message):
        decode(lying)


def test_bits_after_the_last_id_are_zero_or_refused():
    payload = golden("packed_1_bit")
    assert decode(payload) == CASES["packed_1_bit"][0]
    with pytest.raises(RoutingSchemaError, match=r"ends in 0b10.*zeros above its lowest 3 bits"):
        decode(rewritten(lambda h, f: None, payload[:-1] + bytes([payload[-1] | 0x80])))


def test_packed_ids_where_nothing_is_packed_are_refused():
    routed, _ = CASES["raw_uint8_256_experts"]

    def rename(header, fields):
        header["packed_ids"] = header.pop("ids") | {"shape": [routed.ids.size]}

    with pytest.raises(RoutingSchemaError, match="packed_ids of 8 bits, expected raw ids"):
        decode(rewritten(rename, encode(routed)))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("eyJ", "payload is a str, expected bytes .* base64"),
        (np.zeros((4, 4))[:, 1], "expected bytes or a contiguous buffer"),
        (b"", "0 bytes"),
        (encode(ROUTED)[:50], "cut off"),
        (encode(ROUTED)[: len(encode(ROUTED)) // 2], "cut off"),
        (encode(ROUTED)[:-1], "checksum"),
        (encode(ROUTED) + b"x", "checksum"),
        (rewritten(lambda h, f: b"x", encode(ROUTED)), "holds 49 bytes of data, expected 48"),
        ((1 << 40).to_bytes(8, "little") + b"x" * 99, "declares a header of"),
        ((2).to_bytes(8, "little") + b"{]", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "is a list"),
        ((4).to_bytes(8, "little") + b"{\0}\0", "not JSON"),
        ((60_000).to_bytes(8, "little") + b"[" * 60_000, "not JSON"),
    ],
)
def test_a_payload_cut_or_foreign_is_refused_by_name(payload, message):
    with pytest.raises(RoutingSchemaError, match=message):
        decode(payload)


def test_ids_are_checked_unless_the_caller_says_that_it_checks_them():
    unchecked = decode(encode(ROUTED), check_ids=False)
    assert unchecked == ROUTED
    broken = rewritten(put(num_experts=257), encode(ROUTED, packed=False))
    with pytest.raises(RoutingSchemaError, match="distinct experts below 257"):
        decode(broken)
    assert np.array_equal(decode(broken, check_ids=False).ids, ROUTED.ids)


def test_a_payload_of_another_model_is_refused():
    other = RoutingLayout(300, 4, (1, 3), 4)
    with pytest.raises(RoutingSchemaError, match=r"moe_layers \(1, 2\) instead of \(1, 3\)"):
        decode(encode(ROUTED), expect=other)


def test_an_error_does_not_repeat_a_megabyte_of_the_payload():
    long = rewritten(put(moe_layers=[0] * 200_000), encode(ROUTED))
    with pytest.raises(RoutingSchemaError, match="number layers as Hugging Face does") as error:
        decode(long)
    assert len(str(error.value)) < 3000


@settings(max_examples=300)
@given(st.data())
def test_a_changed_byte_is_noticed(data):
    payload = bytearray(encode(ROUTED, packed=data.draw(st.booleans())))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RoutingSchemaError):
        assert decode(payload) == ROUTED  # only a byte of white space may change unnoticed


def test_a_header_that_no_reader_would_take_is_not_written():
    ids = np.resize(ROUTED.ids[0], (40_000, 2, 4))
    spans = tuple(Span(i, i + 1, Source.ROLLOUT, str(i)) for i in range(40_000))
    with pytest.raises(RoutingSchemaError, match="merge some of the spans"):
        encode(RoutedExperts(ids, LAYOUT, 0, None, spans))


def test_mutated_payloads_decode_to_the_same_rows_or_raise_our_error():
    """A slice of ``python -m tests.schema.fuzz_codec``, which runs 200,000 payloads."""
    outcomes = fuzz(2000, seed=1)
    assert outcomes["refused"] > 1000
    assert outcomes["valid rows"] > 50
