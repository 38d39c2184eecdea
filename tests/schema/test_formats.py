"""Every format: what is written is read back, marks are known, ambiguity asks, garbage is named."""

import base64
import json
import struct
import sys
import tracemalloc

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared_schema import RoutedExperts, RoutingLayout, RoutingSchemaError, RowStatus
from shared_schema.formats import (
    FORMATS,
    from_array,
    from_fireworks,
    from_nemo_rl,
    from_nested,
    from_prime_rl,
    from_sglang,
    from_skyrl,
    from_vllm_split,
    to_fireworks,
    to_nemo_rl,
    to_sglang,
    to_skyrl,
    to_vllm_split,
)
from tests.schema.strategies import distinct_ids, layouts

LAYOUT = RoutingLayout(8, 2, (1, 2), 4)
WIDE = RoutingLayout(300, 2, (0, 1), 2)
IDS = distinct_ids(np.random.default_rng(0), 3, LAYOUT)
ROUTED = RoutedExperts(IDS, LAYOUT)
ALL_LAYERS = np.zeros((3, 4, 2), np.int32)
ALL_LAYERS[:, 1:3] = IDS
GAP = RoutedExperts(IDS, LAYOUT, 0, np.array([0, RowStatus.EVICTED, 0], np.uint8))
MISSING_ONE = RoutedExperts(IDS, LAYOUT, 0, np.array([0, RowStatus.MISSING, 0], np.uint8))
WRITABLE = [name for name, fmt in FORMATS.items() if fmt.can_write]
CAN_SAY_UNRECORDED = {"r3", "nemo-rl", "fireworks"}


def b64(payload):
    return base64.b64encode(bytes(payload)).decode()


def options(fmt, start=None):
    """What a reader has to be told beside the layout."""
    return {"token_start": start, "layers": "all" if fmt.name == "sglang" else None}


@st.composite
def complete_sequences(draw):
    """Complete sequences in which no row looks like one of a format's marks."""
    layout = draw(layouts().filter(lambda layout: layout.top_k > 1))
    rows = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = distinct_ids(rng, rows, layout)
    assume(not (ids == np.arange(layout.top_k)).all((1, 2)).any())
    return RoutedExperts(ids, layout, draw(st.integers(0, 50)))


@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=40)
@given(routed=complete_sequences())
def test_a_complete_sequence_comes_back_as_it_was_written(name, routed):
    fmt = FORMATS[name]
    said = options(fmt, routed.token_start)
    assert fmt.read(fmt.write(routed), routed.layout, **said) == routed
    assert fmt.read_file(fmt.write_file(routed), routed.layout, **said) == routed


@pytest.mark.parametrize("name", WRITABLE)
def test_an_unrecorded_row_is_written_as_one_or_not_at_all(name):
    fmt = FORMATS[name]
    if name in CAN_SAY_UNRECORDED:
        again = fmt.read_file(fmt.write_file(GAP), LAYOUT)
        assert again.recorded.tolist() == [True, False, True]
        assert np.array_equal(again.ids, GAP.ids)
    else:
        with pytest.raises(RoutingSchemaError, match=r"position 1 is unrecorded \(EVICTED\)"):
            fmt.write(GAP)


# ---- bytes made by hand from each peer's description ----


class RoutedExpertsStruct(msgspec.Struct, array_like=True):
    """prime-rl's struct."""

    data: bytes
    shape: list[int]
    dtype: str


def r3v1(
    mode,
    selector,
    matrices,
    total,
    carried,
    first=0,
    version=1,
    magic=b"R3V1",
    tail=b"",
    matrix_size=None,
):
    """Fireworks' payload of uint8 ids, field by field."""
    matrices = bytes(matrices)
    header = magic + bytes([version, mode, 1, 0])
    header += struct.pack("<III", total, carried, first) + struct.pack("<I", len(selector))
    header += struct.pack("<Q", len(matrices) if matrix_size is None else matrix_size)
    assert len(header) == 32
    payload = header + selector + matrices + tail
    return b64(zstandard.ZstdCompressor().compress(payload))


PRIME = RoutedExpertsStruct(ALL_LAYERS.astype(np.uint8).tobytes(), [3, 4, 2], "uint8")
KIND = [
    (from_sglang, b64(ALL_LAYERS.astype("<i4").tobytes()), {"layers": "all"}),
    (from_sglang, b64(ALL_LAYERS.astype("<i4").tobytes()), {"num_rows": 3}),
    (from_sglang, b64(ALL_LAYERS.astype("u1").tobytes()), {"dtype": "uint8"}),
    (from_sglang, b64(ALL_LAYERS.astype("<i4").tobytes()).encode(), {"num_rows": 3}),
    (
        from_skyrl,
        {"data": b64(ALL_LAYERS.astype("u1").tobytes()), "shape": [3, 4, 2], "dtype": "uint8"},
        {},
    ),
    (
        from_skyrl,
        {"data": b64(IDS.astype("<i2").tobytes()), "shape": [3, 2, 2], "dtype": "int16"},
        {},
    ),
    (from_prime_rl, PRIME, {}),
    (from_prime_rl, msgspec.msgpack.decode(msgspec.msgpack.encode(PRIME)), {}),
    (from_prime_rl, {"data": b64(IDS), "shape": [3, 2, 2], "start": 0}, {}),
    (from_nemo_rl, "nrlre1:int8:3x2x2:" + b64(IDS), {}),
    (from_nemo_rl, "nrlre1:int32:3x4x2:" + b64(ALL_LAYERS.astype("<i4")), {}),
    (from_fireworks, r3v1(0, b"", IDS, total=3, carried=3), {}),
    (from_fireworks, base64.b64decode(r3v1(0, b"", IDS, total=3, carried=3)), {}),
    (from_fireworks, r3v1(1, b"", IDS, total=4, carried=3, first=0), {}),
    (from_nested, IDS.tolist(), {}),
    (from_nested, ALL_LAYERS.tolist(), {"layers": "all"}),
    (from_array, IDS.astype(np.int64), {}),
    (from_array, np.asfortranarray(ALL_LAYERS), {}),
]


@pytest.mark.parametrize(("reader", "data", "said"), KIND)
def test_what_a_peer_writes_is_read(reader, data, said):
    assert reader(data, LAYOUT, **said) == ROUTED


def test_nemo_rls_own_example_is_read():
    layout = RoutingLayout(8, 2, (0,), 1)
    routed = from_nemo_rl("nrlre1:int16:2x1x2:AAABAAIAAwA=", layout)
    assert routed.ids.tolist() == [[[0, 1]], [[2, 3]]]


def test_a_payload_that_says_where_it_starts_is_believed_and_not_contradicted():
    envelope = {"data": b64(IDS), "shape": [3, 2, 2], "start": 7, "dtype": "uint8"}
    suffix = r3v1(1, b"", IDS, total=11, carried=3, first=7)
    later = RoutedExperts(IDS, LAYOUT, 7)
    for reader, data in ((from_prime_rl, envelope), (from_fireworks, suffix)):
        assert reader(data, LAYOUT) == reader(data, LAYOUT, 7) == later
        with pytest.raises(RoutingSchemaError, match="token_start is 3, expected 7"):
            reader(data, LAYOUT, 3)


def test_fireworks_bitmap_leaves_the_other_rows_missing():
    routed = from_fireworks(r3v1(2, bytes([0b10100]), IDS[:2], total=6, carried=2), LAYOUT)
    assert routed.recorded.tolist() == [False, False, True, False, True, False]
    assert np.array_equal(routed.ids[[2, 4]], IDS[:2])
    assert set(routed.status.tolist()) == {RowStatus.RECORDED, RowStatus.MISSING}


def test_envelopes_are_written_as_their_own_readers_want_them():
    wide = RoutedExperts(np.array([[[299, 0], [1, 2]]]), WIDE)
    envelope = to_skyrl(wide)
    assert list(envelope) == ["data", "shape", "dtype"], "data first"
    assert envelope["dtype"] == "int16"
    assert to_skyrl(ROUTED)["dtype"] == "uint8"
    assert to_nemo_rl(wide).startswith("nrlre1:int16:1x2x2:")
    assert to_nemo_rl(GAP) == "nrlre1:int8:3x2x2:" + b64(
        np.where(GAP.ids == 255, -1, GAP.ids).astype("i1")
    )
    assert base64.b64decode(to_sglang(ROUTED)) == ALL_LAYERS.astype("<i4").tobytes()
    raw = zstandard.ZstdDecompressor().decompress(base64.b64decode(to_fireworks(wide)))
    assert raw[:8] == b"R3V1\x01\x00\x02\x00"
    assert raw[32:] == wide.ids.astype("<u2").tobytes()


def test_vllm_021_gives_the_prompts_rows_once_for_all_outputs():
    prompt, output = ALL_LAYERS[:2].tolist(), ALL_LAYERS[2:].tolist()
    assert from_vllm_split(prompt, output, LAYOUT) == ROUTED
    assert from_vllm_split(ALL_LAYERS[:2], ALL_LAYERS[2:], LAYOUT) == ROUTED
    assert from_vllm_split(prompt, None, LAYOUT) == ROUTED[:2]
    assert to_vllm_split(ROUTED, 2) == {"prompt_routed_experts": prompt, "routed_experts": output}
    assert (
        FORMATS["vllm-split"].read_file(json.dumps(to_vllm_split(ROUTED, 2)).encode(), LAYOUT)
        == ROUTED
    )
    with pytest.raises(RoutingSchemaError, match="prompt_routed_experts is None"):
        from_vllm_split(None, output, LAYOUT)


# ---- marks of unrecorded rows, and what only looks like one ----


def marked(value, dtype=np.int32):
    rows = IDS.astype(dtype)
    rows[1] = value
    return rows


@pytest.mark.parametrize(
    ("reader", "data"),
    [
        (from_sglang, b64(np.ascontiguousarray(marked(0)))),
        (from_prime_rl, {"data": b64(marked(0, np.uint8)), "shape": [3, 2, 2]}),
        (from_nemo_rl, "nrlre1:int32:3x2x2:" + b64(marked(-1))),
        (from_array, marked(-1)),
        (from_array, marked(255, np.uint8)),
        (from_array, marked(65_535, np.uint16)),
        (from_nested, marked(-1).tolist()),
    ],
)
def test_a_peers_mark_of_an_unrecorded_row_is_known(reader, data):
    said = {"layers": "moe"} if reader is from_sglang else {}
    assert reader(data, LAYOUT, **said) == MISSING_ONE


@pytest.mark.parametrize(
    ("reader", "data"),
    [
        (from_array, marked(0)),
        (from_array, marked(3)),
        (from_array, marked([-1, 3])),
        (from_sglang, b64(marked([[0, 0], [1, 2]]))),
        (from_sglang, b64(marked(3))),
        (from_nested, marked(0).tolist()),
        (from_skyrl, {"data": b64(marked(0, np.uint8)), "shape": [3, 2, 2], "dtype": "uint8"}),
        (from_nemo_rl, "nrlre1:int32:3x2x2:" + b64(marked(0))),
        (from_fireworks, r3v1(0, b"", marked(0, np.uint8), total=3, carried=3)),
    ],
)
def test_repeated_experts_never_pass_as_a_route(reader, data):
    said = {"layers": "moe"} if reader is from_sglang else {}
    with pytest.raises(RoutingSchemaError, match="expected 2 distinct experts below 8"):
        reader(data, LAYOUT, **said)


def test_a_zero_row_of_one_expert_asks_whether_it_is_one():
    layout = RoutingLayout(8, 1, (0, 1), 2)
    zeros = np.array([[[1], [0]], [[0], [0]]])
    with pytest.raises(RoutingSchemaError, match="the first of them row 1, are zero in all 2 MoE"):
        from_array(zeros, layout)
    assert from_array(zeros, layout, status=np.zeros(2, np.uint8)).is_complete


def test_skyrls_padding_asks_for_its_mask():
    envelope = {"data": b64(marked([0, 1], np.uint8)), "shape": [3, 2, 2], "dtype": "uint8"}
    with pytest.raises(RoutingSchemaError, match="the first of them row 1, are experts 0 … 1"):
        from_skyrl(envelope, LAYOUT)
    padding = np.array([False, True, False])
    status = np.where(padding, RowStatus.MISSING, RowStatus.RECORDED)
    assert from_skyrl(envelope, LAYOUT, status=status) == MISSING_ONE


def test_bytes_that_fit_all_layers_and_moe_layers_ask_which():
    """Two rows of two layers, the first dense, or four rows of one layer, of which two are zero."""
    layout = RoutingLayout(8, 2, (1,), 2)
    text = b64(np.array([0, 0, 3, 1, 0, 0, 2, 5], "<i4"))
    with pytest.raises(
        RoutingSchemaError, match=r"2 rows of 2 layers \(all\) or 4 rows of 1 layers"
    ):
        from_sglang(text, layout)
    assert from_sglang(text, layout, layers="all").ids.tolist() == [[[3, 1]], [[2, 5]]]
    assert from_sglang(text, layout, num_rows=2).is_complete
    assert from_sglang(text, layout, num_rows=4).recorded.tolist() == [False, True, False, True]


def test_no_rows_are_no_rows_whatever_the_layers():
    assert len(from_sglang("", LAYOUT)) == len(from_nested([], LAYOUT)) == 0
    with pytest.raises(RoutingSchemaError, match="expected 3 rows of this model"):
        from_sglang("", LAYOUT, num_rows=3)


def test_content_decides_where_only_one_meaning_is_valid():
    """Four rows of four layers could be eight rows of two, but then dense layers' zeros repeat."""
    ids = np.zeros((4, 4, 2), "<i4")
    ids[:, 1:3] = [[3, 1], [2, 5]]
    assert len(from_sglang(b64(ids), LAYOUT)) == 4


def test_base64_in_lines_is_read_from_a_file():
    fmt = FORMATS["vllm"]
    lines = base64.encodebytes(base64.b64decode(fmt.write_file(ROUTED)))
    assert lines.count(b"\n") > 1
    assert fmt.read_file(lines, LAYOUT) == ROUTED


def test_a_layout_is_asked_for_by_name():
    for fmt in FORMATS.values():
        if fmt.needs_layout:
            with pytest.raises(
                RoutingSchemaError, match=f"format {fmt.name} does not say which model"
            ):
                fmt.read(b"", None)
    assert FORMATS["r3"].read(FORMATS["r3"].write(ROUTED)) == ROUTED


def test_what_a_format_cannot_do_is_said():
    with pytest.raises(RoutingSchemaError, match="format vllm-split can only be read"):
        FORMATS["vllm-split"].write(ROUTED)
    with pytest.raises(RoutingSchemaError, match="format vllm lists the layers in one way only"):
        FORMATS["vllm"].read("", LAYOUT, layers="moe")
    with pytest.raises(RoutingSchemaError, match="token_start is 5, expected 0 as the payload"):
        FORMATS["r3"].read(FORMATS["r3"].write(ROUTED), token_start=5)
    with pytest.raises(RoutingSchemaError, match="dtype is 'int8', expected int32, uint16, uint8"):
        from_sglang("", LAYOUT, dtype="int8")


@pytest.mark.parametrize(
    ("reader", "data", "message"),
    [
        (from_array, IDS[0], "expected integers .tokens, layers, 2 experts"),
        (from_array, IDS.astype(float), "float64"),
        (from_array, ALL_LAYERS[:, :3], r"3 layers, expected 4 \(all\) or 2 \(moe\)"),
        (from_array, np.roll(ALL_LAYERS, 1, 1), "dense layer 3 holds ids"),
        (from_nested, [[[1, 2], [3]]], "are uneven"),
        (from_nested, [[[1, 2], [3, None]]], "object"),
        (from_nested, "text", "are a str"),
        (from_nemo_rl, "nrlre1:int64:1x1x1:AA==", "expected nrlre1:<int8"),
        (from_nemo_rl, "nrlre1:int8:3x2x2:" + b64(IDS)[:-4], "9 bytes, expected 12"),
        (from_nemo_rl, "nrlre1:int8:" + "9" * 5000 + "x2x2:", "expected nrlre1:<int8"),
        (from_skyrl, {"data": b64(IDS), "shape": [3, 2, 2], "dtype": "float32"}, "'float32'"),
        (from_skyrl, {"data": b64(IDS), "shape": [3, -2, -2], "dtype": "uint8"}, "0 or more"),
        (from_skyrl, {"data": b64(IDS), "dtype": "uint8"}, "a dict without shape"),
        (from_skyrl, {"data": IDS.tolist(), "shape": [3, 2, 2], "dtype": "uint8"}, "are a list"),
        (from_sglang, b64(ALL_LAYERS)[:-4], "no whole rows"),
        (from_sglang, "\N{BULLET}", "are not base64"),
        (from_fireworks, b64(b"zstd"), "are not a zstd frame"),
        (from_fireworks, r3v1(0, b"", IDS, 3, 3, magic=b"R3V2"), "begins with b'R3V2'"),
        (from_fireworks, r3v1(0, b"", IDS, 3, 3, version=2), "version 2"),
        (from_fireworks, r3v1(3, b"", IDS, 3, 3), "selector 3"),
        (from_fireworks, r3v1(0, b"", IDS, 4, 3), "3 matrices for positions 0 … 4"),
        (from_fireworks, r3v1(1, b"", IDS, 4, 3, first=2), "positions 2 … 5 of 4"),
        (from_fireworks, r3v1(0, b"", bytes(IDS) + b"x", 3, 3), "in 13 bytes"),
        (from_fireworks, r3v1(2, b"\x0f", IDS, 3, 3), "beyond its 3"),
        (from_fireworks, r3v1(2, b"\x03", IDS, 3, 3), "selects 2 tokens, expected 3"),
        (from_fireworks, r3v1(2, b"", IDS, 3, 3), "a selector of 0 bytes"),
    ],
)
def test_what_is_wrong_is_named(reader, data, message):
    with pytest.raises(RoutingSchemaError, match=message):
        reader(data, LAYOUT)


# ---- hostile input ----


def outcome(read, data):
    """The rows, or the one sentence that says why there are none."""
    try:
        return read(data, LAYOUT)
    except RoutingSchemaError as error:
        sentence = str(error)
    assert sentence.endswith((".", "?"))
    return sentence


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_gives_valid_rows_or_one_sentence(name, data):
    fmt = FORMATS[name]
    whole = to_vllm_split(ROUTED, 2)
    content = bytearray(fmt.write_file(ROUTED) if fmt.can_write else json.dumps(whole).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=4))
    read = outcome(fmt.read_file, bytes(content))
    if not isinstance(read, str):
        RoutedExperts(read.ids, LAYOUT, read.token_start, read.status, read.spans)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "shape", "dtype", "start", "routed_experts"]), inner
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60)
@given(data=anything)
def test_any_object_is_refused_with_one_sentence(name, data):
    read = outcome(FORMATS[name].read, data)
    assert isinstance(read, str) or len(read) == 0, "only nothing at all is valid by chance"


def npy_header(shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("vllm", b64(npy_header((10**15, 4, 2)))),
        ("vllm", b64(npy_header((-1, 4, 2)))),
        ("nemo-rl", "nrlre1:int32:999999999999x2x2:AAAA"),
        ("skyrl", {"data": "AAAA", "shape": [10**30, 2, 2], "dtype": "int32"}),
        ("fireworks", r3v1(2, b"", b"", total=2**32 - 1, carried=0)),
        ("fireworks", r3v1(0, b"", IDS, total=1 << 28, carried=1 << 28, matrix_size=1 << 30)),
        ("fireworks", r3v1(0, b"", IDS, total=1 << 26, carried=1 << 26, matrix_size=1 << 28)),
        ("fireworks", r3v1(0, b"", IDS, total=3, carried=3, tail=bytes(1 << 26))),
    ],
)
def test_a_declared_size_is_checked_before_memory_is_taken(name, data):
    tracemalloc.start()
    try:
        assert isinstance(outcome(FORMATS[name].read, data), str)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_without_zstandard_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(RoutingSchemaError, match=r"pip install 'moe-r3\[fireworks\]'"):
        to_fireworks(ROUTED)
