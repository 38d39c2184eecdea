import matplotlib.image
import numpy as np
import pytest

from shared_schema import RoutedExperts, RoutingLayout, encode

from .conftest import LAYOUT, sample


@pytest.fixture
def files(tmp_path):
    """Two samples whose layer 3 always chooses experts 3, 0, 1, 2."""
    paths = []
    for seed in range(2):
        ids = sample(seed).ids.copy()
        ids[:, 2] = [3, 0, 1, 2]
        paths.append(tmp_path / f"{seed}.safetensors")
        paths[-1].write_bytes(encode(RoutedExperts(ids, LAYOUT)))
    return paths


def test_layers_are_counted_over_all_files(r3, files):
    found = r3("stats", "--json", *files).json
    assert found["rows"] == 80
    assert found["pairs"] == 78
    assert found["layout"] == LAYOUT.to_dict()
    assert found["even"]["entropy"] == 4
    first, _, last = found["layers"]
    ids = np.concatenate([sample(seed).ids[:, 0] for seed in range(2)])
    assert first["load"] == np.bincount(ids.ravel(), minlength=16).tolist()
    assert first["imbalance"] == pytest.approx(max(first["load"]) / 20)
    assert last["layer"] == 3
    assert last["unused_experts"] == 12
    assert last["entropy"] == 2
    assert last["imbalance"] == 4
    assert last["shared_with_previous"] == 1
    assert last["shared_by_chance"] == 1


def test_the_table_fits_80_columns(r3, files):
    out = r3("stats", *files).out
    assert max(map(len, out.splitlines())) <= 80
    assert "80 recorded rows of 2 files" in out


def test_a_single_row_has_no_pair_to_share(r3, tmp_path):
    (tmp_path / "x").write_bytes(encode(sample(rows=1)))
    assert r3("stats", "--json", tmp_path / "x").json["layers"][0]["shared_with_previous"] is None
    assert r3("stats", tmp_path / "x").status == 0


def test_the_heat_map_is_dark_where_experts_are_unused(r3, files, tmp_path):
    assert r3("stats", *files, "--plot", tmp_path / "x.png").status == 0
    picture = matplotlib.image.imread(tmp_path / "x.png")[..., :3]
    black = (picture < 0.02).all(-1)
    rows = black.mean(1)
    # 12 of 16 experts in one of three layers, over most of the picture's width.
    assert 0.4 < np.median(rows[rows > 0.3]) < 0.7


def test_a_file_of_another_model_is_named(r3, files, tmp_path):
    layout = RoutingLayout(16, 4, (0, 1, 2), 4)
    (tmp_path / "other").write_bytes(encode(RoutedExperts(sample().ids, layout)))
    done = r3("stats", *files, tmp_path / "other")
    assert done.status == 1
    assert done.err.startswith(f"r3 stats: {tmp_path / 'other'} has moe_layers (0, 1, 2) instead")
