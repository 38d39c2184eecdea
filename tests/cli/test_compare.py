import matplotlib.image
import numpy as np
import pytest

from shared_schema import RoutedExperts, encode

from .conftest import LAYOUT, sample


@pytest.fixture
def pair(tmp_path):
    """Two routings of one sequence: position 30 differs in layer 2, position 7 in order."""
    a = sample()
    ids = a.ids.copy()
    ids[30, 1, 0] = np.setdiff1d(np.arange(16), ids[30, 1])[0]
    ids[7, 0] = np.roll(ids[7, 0], 1)
    paths = tmp_path / "a", tmp_path / "b"
    for path, routed in zip(paths, (a, RoutedExperts(ids, LAYOUT)), strict=True):
        path.write_bytes(encode(routed))
    return paths


def test_the_same_routing_is_status_0(r3, pair):
    done = r3("compare", pair[0], pair[0], "--json")
    assert done.status == 0
    assert (done.json["same_set"], done.json["same_order"]) == (1, 1)


def test_a_set_that_differs_is_status_1_and_found(r3, pair):
    done = r3("compare", *pair, "--json")
    found = done.json
    assert done.status == 1
    assert found["rows"] == 40
    assert found["same_set"] == 119 / 120
    assert found["same_order"] == 118 / 120
    assert found["shared_experts"] == 479 / 480
    assert found["rows_that_differ"] == 1 / 40
    assert {p["layer"]: p["same_set"] for p in found["layers"]} == {1: 1, 2: 39 / 40, 3: 1}
    assert [(p["start"], p["stop"]) for p in found["positions"] if p["same_set"] < 1] == [(28, 31)]
    assert found["positions"][0]["start"] == 0
    assert found["positions"][-1]["stop"] == 40
    assert found["best_shift"] == {"rows": 0, "layers": 0, "same_set": 119 / 120}


def test_the_tables_fit_80_columns(r3, pair):
    out = r3("compare", *pair).out
    assert "the same set of experts in 99.2 % of the choices, in the same order in 98.3 %" in out
    assert max(map(len, out.splitlines()[2:])) <= 80
    assert "28-30" in out


def test_an_order_that_differs_is_no_finding(r3, tmp_path):
    a = sample()
    (tmp_path / "a").write_bytes(encode(a))
    (tmp_path / "b").write_bytes(encode(RoutedExperts(np.roll(a.ids, 1, -1), LAYOUT)))
    done = r3("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert done.status == 0
    assert done.json["same_order"] == 0


def test_a_shift_by_one_row_is_named(r3, tmp_path):
    a = sample()
    (tmp_path / "a").write_bytes(encode(a))
    (tmp_path / "b").write_bytes(encode(RoutedExperts(a.ids[1:], LAYOUT)))
    done = r3("compare", tmp_path / "a", tmp_path / "b")
    assert done.status == 1
    assert "B shifted by +1 rows and +0 MoE layers fits better: 100.0 %" in done.out


def test_the_plot_shows_the_choice_that_differs(r3, pair, tmp_path):
    done = r3("compare", *pair, "--plot", tmp_path / "x.png", "--json")
    assert done.status == 1
    r, g, b, _ = matplotlib.image.imread(tmp_path / "x.png").transpose(2, 0, 1)
    dark_red = (r > 0.3) & (r < 0.5) & (g < 0.1) & (b < 0.1)
    same = tmp_path / "same.png"
    r3("compare", pair[0], pair[0], "--plot", same)
    white, *_ = matplotlib.image.imread(same).transpose(2, 0, 1)
    assert dark_red.sum() > 500
    assert white.mean() > 0.8
    assert r3("compare", *pair, "--plot", tmp_path / "no" / "x.png").err.startswith(
        "r3 compare: cannot write"
    )


def test_folders_are_compared_file_by_file(r3, tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder, turn in zip(folders, (0, 2), strict=True):
        folder.mkdir()
        (folder / "samples.json").write_text("{}")
        for number in range(3):
            ids = sample(number, rows=10 * (number + 1)).ids.copy()
            ids[20:] = np.roll(ids[20:], turn, 1)  # the last sequence, from position 20 on
            (folder / f"{number}.safetensors").write_bytes(encode(RoutedExperts(ids, LAYOUT)))
    done = r3("compare", *folders, "--json")
    found = done.json
    assert done.status == 1
    assert (found["sequences"], found["rows"]) == (3, 60)
    assert found["rows_that_differ"] == 10 / 60
    assert [p["start"] for p in found["positions"] if p["rows_that_differ"]] == [20, 22, 24, 26, 28]
    assert sum(p["rows"] for p in found["positions"]) == 60
    assert r3("compare", *folders, "--plot", tmp_path / "x.png").status == 1

    (folders[1] / "2.safetensors").unlink()
    done = r3("compare", *folders)
    assert done.status == 1
    assert "2.safetensors in one alone" in done.err
    assert r3("compare", folders[0], tmp_path / "x.png").status == 1


def test_sequences_without_a_common_row_are_named(r3, tmp_path):
    paths = tmp_path / "a", tmp_path / "b"
    for path, start in zip(paths, (0, 90), strict=True):
        path.write_bytes(encode(RoutedExperts(sample().ids, LAYOUT, start)))
    done = r3("compare", *paths)
    assert done.status == 1
    assert done.err.startswith(
        f"r3 compare: {paths[0]} and {paths[1]}: the routings hold positions"
    )
