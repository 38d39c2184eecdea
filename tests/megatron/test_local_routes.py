"""What each rank reads of the routes: its own rows and layers, in whatever form they come."""

import mmap
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r3 import InvalidExpertsError, InvalidRoutesError, LayoutMismatchError, RowCountError
from megatron_r3.host_buffer import HostBuffer
from megatron_r3.layout_plan import LayoutPlan, Shard
from megatron_r3.local_routes import read_local_routes
from shared_schema import RoutedExperts, RoutedExpertsBatch, RoutingLayout, encode

LAYOUTS = [
    RoutingLayout(num_experts=experts, top_k=k, moe_layers=(1, 2, 4, 5), num_hidden_layers=6)
    for experts, k in ((8, 1), (16, 3), (256, 4), (384, 6), (128, 8), (512, 8), (40, 16))
]


def routes_of(layout: RoutingLayout, lengths: list[int], seed: int) -> list[RoutedExperts]:
    """One row less than tokens, some of them not recorded, samples beginning anywhere."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        start = int(rng.integers(0, length))
        shape = (length - 1 - start, layout.num_moe_layers, layout.num_experts)
        ids = rng.permuted(np.broadcast_to(np.arange(layout.num_experts), shape), axis=2)
        status = 3 * (rng.random(len(ids)) < 0.2)
        samples.append(RoutedExperts(ids[..., : layout.top_k], layout, start, status))
    return samples


def read(routes: Any, plan: LayoutPlan, layers: Any, layout: RoutingLayout, **how: Any) -> Any:
    out = np.zeros((len(layers), plan.num_rows, layout.top_k), layout.dtype)
    return out, read_local_routes(routes, plan, layers, layout, out, **how)


@settings(deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(1, 60), min_size=2, max_size=5),
    st.sampled_from([(0,), (1, 2), (3, 0), (0, 1, 2, 3), ()]),
    st.sampled_from(["padded", "packed", "shuffled"]),
    st.randoms(use_true_random=False),
)
def test_every_form_of_the_routes_gives_each_row_its_own_experts(
    layout: RoutingLayout, lengths: list[int], layers: Any, kind: str, random: Any
) -> None:
    everything = routes_of(layout, lengths, random.getrandbits(32))
    absent = random.randrange(len(lengths))
    samples = random.choices(range(len(lengths)), k=3)
    chosen = [lengths[i] for i in samples]
    rooms = [-(-n // 8) * 8 for n in chosen]
    shard = Shard(2, random.randrange(2), 2, random.randrange(2))
    if kind == "padded":
        plan = LayoutPlan.padded(chosen, max(rooms), shard=shard)
    else:
        plan = LayoutPlan.packed(chosen, rooms, shard=shard)
    if kind == "shuffled":
        order = np.array(random.sample(range(plan.num_rows), plan.num_rows), int)
        plan = LayoutPlan.from_map(chosen, plan.sample[order], plan.position[order])

    given_routes: list[Any] = list(everything)
    given_routes[absent] = None
    encoded = [r if r is None else random.choice([r, encode(r)]) for r in given_routes]
    empty = [r[:0] if i == absent else r for i, r in enumerate(everything)]
    forms: list[Any] = [
        read(RoutedExpertsBatch.from_list(empty), plan, layers, layout, samples=samples),
        read(given_routes, plan, layers, layout, samples=samples),
        read([encoded[i] for i in samples], plan, layers, layout),
    ]
    for row, (sample, position) in enumerate(zip(plan.sample, plan.position, strict=True)):
        route = everything[samples[sample]]
        at = position - route.token_start
        known = (
            sample >= 0
            and samples[sample] != absent
            and 0 <= at < len(route)
            and bool(route.recorded[at])
        )
        for ids, recorded in forms:
            assert recorded[row] == known
            if known:
                assert np.array_equal(ids[:, row], route.ids[at][list(layers)])


LAYOUT = LAYOUTS[4]
LENGTHS = [64, 64, 64, 64]


def a_batch(layout: RoutingLayout = LAYOUT) -> RoutedExpertsBatch:
    return RoutedExpertsBatch.from_list(
        [RoutedExperts(s.ids, layout) for s in routes_of_all_rows(layout)]
    )


def routes_of_all_rows(layout: RoutingLayout) -> list[RoutedExperts]:
    ids = (np.arange(63 * 4).reshape(63, 4, 1) + np.arange(layout.top_k)) % layout.num_experts
    return [RoutedExperts(ids, layout) for _ in LENGTHS]


def test_a_rank_checks_its_own_rows_and_layers_and_no_others() -> None:
    batch = a_batch()
    batch.values[63 + 40, 2] = batch.values[63 + 40, 2, 0]  # sample 1, position 40
    left = LayoutPlan.packed(LENGTHS, shard=Shard(2, 1))  # holds positions 16 … 47
    right = LayoutPlan.packed(LENGTHS, shard=Shard(2, 0))
    read(batch, right, [2], LAYOUT)
    read(batch, left, [0, 1, 3], LAYOUT)
    with pytest.raises(InvalidExpertsError, match=r"sample 1, position 40, layer 4 has experts"):
        read(batch, left, [1, 2], LAYOUT)
    with pytest.raises(InvalidExpertsError, match=r"sample 0, position 40, layer 4 has experts"):
        read(batch, LayoutPlan.packed([64]), [2], LAYOUT, samples=[1])


def resident(file: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    pattern = rf"{re.escape(str(file))}\n(?:.*\n)*?Rss: +(\d+) kB"
    found = re.findall(pattern, Path("/proc/self/smaps").read_text())
    return sum(int(kib) << 10 for kib in found)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_pages_of_other_samples_in_a_mapped_file_are_not_read(tmp_path: Path) -> None:
    layout = RoutingLayout(128, 8, tuple(range(48)), 48)
    rows, size = 4096, 24  # of 1.5 MiB a sample
    file = tmp_path / "values.bin"
    first = np.arange(rows * 48, dtype=np.uint8).reshape(rows, 48, 1)
    sample = (first + np.arange(8, dtype=np.uint8)) % 128
    np.memmap(file, np.uint8, "w+", shape=(size * rows, 48, 8))[:] = np.tile(sample, (size, 1, 1))
    values = np.memmap(file, np.uint8, "r", shape=(size * rows, 48, 8))
    zeros = np.zeros(size, np.int64)
    batch = RoutedExpertsBatch.trusted(
        values, np.arange(size + 1) * rows, layout, np.zeros(size * rows, np.uint8), zeros, ()
    )
    plan = LayoutPlan.packed([rows], shard=Shard(2, 0, 2, 0))  # the first quarter
    ids, recorded = read(batch, plan, range(12, 24), layout, samples=[12])
    assert recorded.all()
    assert np.array_equal(ids, sample[:1024, 12:24].swapaxes(0, 1))
    own = 1024 * 48 * 8
    assert own <= resident(file) <= own + (4 << 20), (
        "beside them the kernel maps a huge page or two"
    )


def test_routes_come_from_mapped_files_and_buffers(tmp_path: Path) -> None:
    samples = routes_of(LAYOUT, LENGTHS, 0)
    file = tmp_path / "sample.r3"
    file.write_bytes(encode(samples[0]))
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    forms = [file, mapped, bytearray(encode(samples[2])), memoryview(encode(samples[3]))]
    plan = LayoutPlan.packed(LENGTHS)
    ids, recorded = read(forms, plan, [0, 1], LAYOUT)
    expected = read([samples[0], samples[0], *samples[2:]], plan, [0, 1], LAYOUT)
    assert np.array_equal(recorded, expected[1])
    assert np.array_equal(ids[:, recorded], expected[0][:, recorded])


def test_the_files_of_a_rank_are_decoded_one_after_the_other(tmp_path: Path) -> None:
    layout = RoutingLayout(128, 8, tuple(range(48)), 48)
    ids = (np.arange(2048 * 48, dtype=np.uint8).reshape(2048, 48, 1) + np.arange(8)) % 128
    files = [tmp_path / f"{number}.r3" for number in range(16)]
    payload = encode(RoutedExperts(ids, layout))
    for file in files[:4]:  # the others belong to the other ranks of sequence parallelism
        file.write_bytes(payload)
    plan = LayoutPlan.packed([2048] * 16, shard=Shard(2, 0, 4, 0))
    tracemalloc.start()
    _, recorded = read(files, plan, range(12), layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert recorded.all()
    own, sample = plan.num_rows * 12 * 8, 2048 * 48 * 8
    assert peak < 2 * own + 2 * sample


def damaged() -> bytes:
    payload = bytearray(encode(a_batch()[0]))
    payload[-1] ^= 1
    return bytes(payload)


def wide(dtype: Any) -> RoutedExperts:
    route = a_batch()[0]
    status = np.zeros(len(route), np.uint8)
    return RoutedExperts.trusted(route.ids.astype(dtype), LAYOUT, 0, status, ())


@pytest.mark.parametrize(
    ("routes", "samples", "error", "message"),
    [
        (a_batch().values, None, InvalidRoutesError, "routes is a ndarray, expected a Routed"),
        (encode(a_batch()[0]), None, InvalidRoutesError, "routes is a bytes, expected a Routed"),
        ([a_batch()[0].ids] * 4, None, InvalidRoutesError, "sample 0 .* a ndarray, expected"),
        ([None, None, None, b"?"], None, InvalidRoutesError, "sample 3 cannot be read.* 1 bytes"),
        ([None, damaged()] * 2, None, InvalidRoutesError, "sample 1 cannot be read.* checksum"),
        ([Path("/nowhere/1.r3")] * 4, None, InvalidRoutesError, "sample 0 .*No such file"),
        ([wide(np.int64)] * 4, None, LayoutMismatchError, "dtype int64, expected uint8 for 128"),
        ([wide(np.uint16)] * 4, None, LayoutMismatchError, "dtype uint16, expected uint8"),
        ([wide(np.float32)] * 4, None, LayoutMismatchError, "float32.* expected an integer"),
        (a_batch(LAYOUTS[5]), None, LayoutMismatchError, "num_experts 512 instead of 128"),
        (a_batch(), [0, 1, 2], RowCountError, "routes for 3 samples, expected 4"),
        (a_batch(), [0, 1, 2, 4], RowCountError, r"samples is \[0, 1, 2, 4\].* 0 … 3"),
        (a_batch(), [0, 1, 2, -1], RowCountError, r"samples is \[0, 1, 2, -1\].* 0 … 3"),
        ([a_batch()[0][:61]] * 4, None, RowCountError, "sample 0 has rows up to position 60"),
    ],
)
def test_what_is_no_route_of_the_micro_batch_is_named(
    routes: Any, samples: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(routes, LayoutPlan.packed(LENGTHS), [0, 1], LAYOUT, samples=samples)


def filled(device: torch.device) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    arrays = [np.arange(5, dtype=np.uint16), np.arange(0), np.arange(7) % 2 == 0, np.arange(3)]
    buffer = HostBuffer(sum(array.nbytes for array in arrays), device)
    reserved = buffer.reserve((5,), np.dtype(np.uint16))
    for array in arrays[1:]:
        buffer.append(array)
    reserved[:] = arrays[0]
    return arrays, buffer.to_device()


def test_arrays_of_a_buffer_keep_their_dtypes() -> None:
    arrays, tensors = filled(torch.device("cpu"))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1, "one copy"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_buffer_is_copied_beside_the_compute_without_the_host_waiting() -> None:
    device = torch.device("cuda", 0)
    filled(device)  # the first use makes the stream and pins memory
    work = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):
            work = torch.mm(work, work).mul_(1e-3)
        done.record()
        arrays, tensors = filled(device)
        assert not done.query(), "the compute ended before the copy was even asked for"
        sums = [tensor.long().sum() for tensor in tensors]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [int(total) for total in sums] == [int(array.sum()) for array in arrays]
