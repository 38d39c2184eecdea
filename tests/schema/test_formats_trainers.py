"""Batches go to verl and slime and come back without a copy of their rows."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from shared_schema import (
    RoutedExperts,
    RoutedExpertsBatch,
    RoutingLayout,
    RoutingSchemaError,
    RowStatus,
    merge,
)
from shared_schema.formats import from_array, from_slime, from_verl, to_slime, to_verl
from tests.schema.strategies import distinct_ids

ALL_MOE = RoutingLayout(16, 2, (0, 1, 2), 3)
DENSE_FIRST = RoutingLayout(16, 2, (1, 2), 3)
EVERY_OTHER = RoutingLayout(16, 2, (1, 3), 5)
UNEVEN = RoutingLayout(16, 2, (0, 1, 3), 4)
WIDE = RoutingLayout(384, 2, (0, 1, 2), 3)


def batch_of(layout, lengths=(4, 0, 3), status=None):
    rng = np.random.default_rng(0)
    samples = [RoutedExperts(distinct_ids(rng, n, layout), layout) for n in lengths]
    batch = RoutedExpertsBatch.from_list(samples)
    return RoutedExpertsBatch(batch.values, batch.offsets, layout, status)


@pytest.mark.parametrize(("layout", "dtype"), [(ALL_MOE, torch.uint8), (WIDE, torch.int16)])
def test_verl_shares_a_batchs_memory_both_ways(layout, dtype):
    batch = batch_of(layout)
    nested, mask = to_verl(batch)
    assert nested.layout == torch.jagged
    assert nested.dtype == dtype
    assert tuple(nested.shape)[::2] == (3, 3)
    assert nested.values().data_ptr() == batch.values.ctypes.data
    assert nested.offsets().data_ptr() == batch.offsets.ctypes.data
    assert mask.values().all()
    again = from_verl(nested, layout)
    assert again == batch
    assert np.shares_memory(again.values, batch.values)
    assert np.shares_memory(again.offsets, batch.offsets)


@pytest.mark.parametrize("layout", [DENSE_FIRST, EVERY_OTHER])
def test_a_batch_is_a_view_of_verls_tensor_also_where_layers_are_dense(layout):
    batch = batch_of(layout)
    nested, _ = to_verl(batch)
    again = from_verl(nested, layout)
    assert again == batch
    assert nested.values()[:, layout.moe_layers[0]].data_ptr() == again.values.ctypes.data
    moe_only, _ = to_verl(batch, layers="moe")
    assert moe_only.values().data_ptr() == batch.values.ctypes.data
    assert from_verl(moe_only, layout, layers="moe") == batch


def test_layers_that_no_slice_can_name_are_copied_and_right():
    batch = batch_of(UNEVEN)
    assert from_verl(to_verl(batch)[0], UNEVEN) == batch
    assert from_slime(to_slime(batch), UNEVEN) == batch


def test_unrecorded_rows_are_zero_and_masked_for_verl_and_known_again():
    status = np.array([0, 0, 0, RowStatus.MISSING, 0, RowStatus.MISSING, 0], np.uint8)
    batch = batch_of(ALL_MOE, status=status)
    nested, mask = to_verl(batch)
    assert (nested.values()[[3, 5]] == 0).all()
    assert mask.values().tolist() == (status == 0).tolist()
    assert from_verl(nested, ALL_MOE) == from_verl(nested, ALL_MOE, mask) == batch
    with pytest.raises(RoutingSchemaError, match=r"position 3 is unrecorded \(MISSING\)"):
        to_slime(batch)


def test_verls_row_for_the_last_sampled_token_is_added_and_masked():
    sample = batch_of(ALL_MOE, (4,))[0]
    nested, mask = to_verl(RoutedExpertsBatch.from_list([merge([sample], length=5)]))
    assert nested.values().shape == (5, 3, 2)
    assert mask.values().tolist() == [True] * 4 + [False]


def test_one_token_experts_need_verls_mask():
    layout = RoutingLayout(8, 1, (0,), 1)
    batch = RoutedExpertsBatch(np.array([[[0]], [[3]]], np.uint8), np.array([0, 2]), layout)
    nested, mask = to_verl(batch)
    assert from_verl(nested, layout, mask) == batch
    with pytest.raises(RoutingSchemaError, match="pass status"):
        from_verl(nested, layout)


def test_slime_shares_a_batchs_memory_both_ways():
    batch = batch_of(ALL_MOE)
    arrays = to_slime(batch)
    assert [len(a) for a in arrays] == [4, 0, 3]
    assert all(np.shares_memory(a, batch.values) for a in arrays if len(a))
    again = from_slime(arrays, ALL_MOE)
    assert again == batch
    assert np.shares_memory(again.values, batch.values)


def test_slimes_own_int32_arrays_and_tensors_are_read():
    batch = batch_of(DENSE_FIRST)
    arrays = to_slime(batch, np.int32)
    assert arrays[0].dtype == np.int32
    assert not arrays[0][:, 0].any()
    copies = pickle.loads(pickle.dumps(arrays))
    assert from_slime(copies, DENSE_FIRST) == batch
    assert from_slime([torch.from_numpy(a) for a in arrays], DENSE_FIRST) == batch


def test_arrays_that_only_happen_to_be_neighbours_are_copied():
    """Memory of two owners must not be shown as one: the second may be freed."""
    block = batch_of(ALL_MOE, (4, 3)).values
    memory = bytearray(block)
    owners = memoryview(memory)[: block[:4].nbytes], memoryview(memory)[block[:4].nbytes :]
    first, second = (np.frombuffer(o, np.uint8).reshape(-1, 3, 2) for o in owners)
    assert first.ctypes.data + first.nbytes == second.ctypes.data
    batch = from_slime([first, second], ALL_MOE)
    assert np.array_equal(batch.values, block)
    assert not np.shares_memory(batch.values, first)
    out_of_order = from_slime([block[4:], block[:4]], ALL_MOE)
    assert np.array_equal(out_of_order.values, np.concatenate([block[4:], block[:4]]))


def test_a_torch_tensor_is_read_without_a_copy():
    ids = batch_of(ALL_MOE, (4,)).values
    tensor = torch.from_numpy(ids)
    routed = from_array(tensor, ALL_MOE)
    assert np.shares_memory(routed.ids, ids)
    assert from_array(tensor.long(), ALL_MOE) == routed
    with pytest.raises(RoutingSchemaError, match="numpy cannot view"):
        from_array(tensor.bfloat16(), ALL_MOE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_verl(torch.zeros(2, 3, 2), ALL_MOE), "expected a nested tensor"),
        (lambda: from_verl(to_verl(batch_of(ALL_MOE))[0], DENSE_FIRST), "dense layer 0 holds ids"),
        (
            lambda: from_verl(
                to_verl(batch_of(ALL_MOE))[0], ALL_MOE, to_verl(batch_of(ALL_MOE, (4,)))[1]
            ),
            "expected 7 booleans",
        ),
        (
            lambda: to_verl(RoutedExpertsBatch.from_list([batch_of(ALL_MOE, (4,))[0][1:]])),
            "sequence 0 begins at position 1",
        ),
        (
            lambda: to_verl(batch_of(RoutingLayout(40_000, 2, (0,), 1))),
            "num_experts is 40000, expected at most 32768",
        ),
        (lambda: from_slime([], ALL_MOE), "expected a list"),
        (lambda: from_slime([np.zeros((1, 3))], ALL_MOE), "expected integers"),
        (
            lambda: from_slime([np.zeros((1, 3, 2), int), np.zeros((1, 2, 2), int)], ALL_MOE),
            r"\[2, 3\] layers",
        ),
        (lambda: from_slime([np.ones((1, 3, 2), int)], ALL_MOE), "expected 2 distinct experts"),
    ],
)
def test_what_is_wrong_with_a_batch_is_named(call, message):
    with pytest.raises(RoutingSchemaError, match=message):
        call()


def test_torch_is_asked_for_and_not_imported():
    code = (
        "import sys, numpy as np\n"
        "from shared_schema import RoutedExpertsBatch, RoutingLayout, RoutingSchemaError\n"
        "from shared_schema.formats import FORMATS, to_verl\n"
        "layout = RoutingLayout(8, 1, (0,), 1)\n"
        "batch = RoutedExpertsBatch(np.zeros((1, 1, 1), np.uint8), np.array([0, 1]), layout)\n"
        "try:\n    to_verl(batch)\n"
        "except RoutingSchemaError as error:\n    print(error)\n"
        "print(sorted({'torch', 'zstandard', 'msgspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, imported = done.stdout.splitlines()
    assert message == (
        "torch is not imported, expected it for a nested tensor: import torch first."
    )
    assert imported == "[]"
