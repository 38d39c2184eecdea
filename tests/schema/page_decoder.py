"""A reader of the byte format, written from FORMAT.md alone: plain Python, nothing of ours."""

import json

import xxhash


def read_page(payload):
    """The fields, the rows by position (``None`` where not carried) and the reasons by position."""
    header_length = int.from_bytes(payload[:8], "little")
    assert header_length <= 2**20
    header = json.loads(payload[8 : 8 + header_length].decode("utf-8"))
    data = payload[8 + header_length :]
    assert header_length % 8 == 0
    metadata = header.pop("__metadata__")
    covered = metadata["moe_r3"].encode("utf-8") + data
    assert xxhash.xxh3_64_hexdigest(covered) == metadata["xxh3_64"]
    fields = json.loads(metadata["moe_r3"])
    assert fields["version"] == 1
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert end == len(data)

    def tensor(name):
        begin, stop = header[name]["data_offsets"]
        return header[name]["dtype"], header[name]["shape"], data[begin:stop]

    num_rows, num_carried = fields["num_rows"], fields["num_carried"]
    experts, top_k, layers = fields["num_experts"], fields["top_k"], len(fields["moe_layers"])
    if fields["selector"] == "all":
        carried = [True] * num_rows
    elif fields["selector"] == "suffix":
        carried = [row >= num_rows - num_carried for row in range(num_rows)]
    else:
        assert fields["selector"] == "bitmap"
        dtype, shape, bitmap = tensor("recorded")
        assert (dtype, shape) == ("U8", [(num_rows + 7) // 8])
        carried = [bitmap[row // 8] >> row % 8 & 1 == 1 for row in range(num_rows)]
    assert sum(carried) == num_carried
    assert ("recorded" in header) == (fields["selector"] == "bitmap")

    assert num_carried < num_rows or fields["selector"] == "all"
    assert bool(fields["spans"]) == (num_rows > 0)

    count = num_carried * layers * top_k
    assert ("ids" in header) != ("packed_ids" in header)
    if "ids" in header:
        dtype, shape, raw = tensor("ids")
        size = 1 if experts <= 256 else 2
        assert (dtype, shape) == (f"U{8 * size}", [num_carried, layers, top_k])
        flat = [int.from_bytes(raw[size * j : size * (j + 1)], "little") for j in range(count)]
    else:
        bits = max(1, (experts - 1).bit_length())
        dtype, shape, packed = tensor("packed_ids")
        assert (dtype, shape) == ("U8", [(count * bits + 7) // 8])
        stream = int.from_bytes(packed, "little")
        flat = [stream >> j * bits & (1 << bits) - 1 for j in range(count)]
        assert stream >> count * bits == 0

    assert ("status" in header) == (num_carried < num_rows)
    reasons = []
    if "status" in header:
        dtype, shape, reasons = tensor("status")
        assert dtype == "U8"
        assert shape in ([1], [num_rows - num_carried])
        reasons = list(reasons) * (num_rows - num_carried if shape == [1] else 1)

    ids, missing = iter(flat), iter(reasons)
    rows, why = {}, {}
    for row in range(num_rows):
        position = fields["token_start"] + row
        if carried[row]:
            rows[position] = [[next(ids) for _ in range(top_k)] for _ in range(layers)]
            assert all(
                len(set(slots)) == top_k and max(slots) < experts for slots in rows[position]
            )
        else:
            rows[position], why[position] = None, next(missing)
    return fields, rows, why
