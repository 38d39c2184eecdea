import numpy as np

from shared_schema import RoutedExperts, encode

from .conftest import LAYOUT, sample


def test_it_says_what_the_file_holds(r3, folder):
    path = folder / "gaps.safetensors"
    (found,) = r3("inspect", "--json", path).json["files"]
    assert found["file"] == str(path)
    assert found["layout"] == LAYOUT.to_dict()
    assert found["dtype"] == "uint8"
    assert (found["token_start"], found["token_stop"], found["rows"]) == (3, 43, 40)
    assert found["recorded_rows"] == 36
    assert found["unrecorded_rows"] == {"EVICTED": [[14, 15]], "STEP_LOST": [[8, 11]]}
    assert found["repeated_rows"] == 0
    assert [(s["start"], s["stop"], s["weight_version"]) for s in found["spans"]] == [
        (3, 13, "7"),
        (13, 43, "8"),
    ]
    assert found["bytes"]["file"] == path.stat().st_size
    assert found["bytes"]["raw"] == 40 * 3 * 4
    assert found["bytes"]["packed"] == 40 * 3 * 4 // 2

    text = r3("inspect", path).out
    assert "E 16, k 4, 3 MoE layers (1-3) of 4, ids in uint8" in text
    assert "40, positions 3 … 42" in text
    assert "36 (90.0 %)" in text
    assert "3 STEP_LOST at 8-10" in text
    assert "13 … 42: rollout, weights 8" in text


def test_an_even_load_needs_the_bits_of_an_even_choice(r3, tmp_path):
    # Each expert as often as any other: rotate 0 … 15 through all rows.
    ids = (np.arange(16)[:, None, None] + 3 * np.arange(3)[:, None] + np.arange(4)) % 16
    (tmp_path / "even").write_bytes(encode(RoutedExperts(ids.astype(np.uint8), LAYOUT)))
    sizes = r3("inspect", "--json", tmp_path / "even").json["files"][0]["bytes"]
    assert round(sizes["load_entropy"], 6) == round(sizes["even_choice"], 6) < sizes["packed"]


def test_rows_that_repeat_the_one_before_are_counted(r3, tmp_path):
    ids = sample().ids.copy()
    ids[10:14] = ids[10]
    (tmp_path / "x").write_bytes(encode(RoutedExperts(ids, LAYOUT)))
    assert r3("inspect", "--json", tmp_path / "x").json["files"][0]["repeated_rows"] == 3
    assert "repeated  3" in r3("inspect", tmp_path / "x").out


def test_no_rows_are_shown_as_such(r3, tmp_path):
    empty = RoutedExperts(np.empty((0, 3, 4), np.uint8), LAYOUT)
    (tmp_path / "x").write_bytes(encode(empty))
    assert r3("inspect", tmp_path / "x").status == 0
    assert r3("inspect", "--json", tmp_path / "x").json["files"][0]["rows"] == 0


def test_good_files_are_shown_beside_a_bad_one(r3, folder):
    done = r3("inspect", folder / "absent", folder / "whole.safetensors")
    assert done.status == 1
    assert "absent" in done.err
    assert "whole.safetensors" in done.out


def test_other_formats_are_read_with_a_layout(r3, folder):
    r3("convert", "--to", "vllm", folder / "whole.safetensors")
    done = r3("inspect", "--from", "vllm", "--layout", folder, folder / "whole.b64", "--json")
    (found,) = done.json["files"]
    assert found["recorded_rows"] == 40
    assert found["layout"] == LAYOUT.to_dict()
