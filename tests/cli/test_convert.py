import resource

import pytest

from shared_schema import decode
from shared_schema.formats import FORMATS

from .conftest import sample

WRITERS = [f.name for f in FORMATS.values() if f.can_write]


@pytest.mark.parametrize("name", WRITERS)
def test_there_and_back_again_is_the_same_file(r3, folder, name):
    there = folder / f"there{FORMATS[name].suffix}"
    back = folder / "back.safetensors"
    whole = folder / "whole.safetensors"
    assert r3("convert", "--to", name, whole, "--output", there).status == 0
    layout = ["--layout", folder / "config.json"]
    done = r3("convert", "--from", name, "--to", "r3", *layout, there, "--output", back, "--json")
    assert done.status == 0
    assert decode(back.read_bytes()) == sample()
    assert done.json["files"] == [
        {
            "source": str(there),
            "target": str(back),
            "rows": 40,
            "source_bytes": there.stat().st_size,
            "target_bytes": back.stat().st_size,
        }
    ]


def test_nothing_is_overwritten_without_force(r3, folder):
    whole, there = folder / "whole.safetensors", folder / "whole.npy"
    there.write_text("precious")
    done = r3("convert", "--to", "npy", whole)
    assert done.status == 1
    assert "pass --force" in done.err
    assert there.read_text() == "precious"
    assert r3("convert", "--to", "npy", whole, "--force").status == 0
    assert there.read_bytes().startswith(b"\x93NUMPY")


@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_fills_up_loses_nothing(r3, folder, force):
    whole, there = folder / "whole.safetensors", folder / "whole.npy"
    if force:
        there.write_text("precious")
    before = sorted(folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        done = r3("convert", "--to", "npy", whole, *["--force"] * force)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.status == 1
    assert "cannot write" in done.err
    assert sorted(folder.iterdir()) == before
    assert not force or there.read_text() == "precious"


def test_an_input_is_never_an_output(r3, folder):
    whole = folder / "whole.safetensors"
    before = whole.read_bytes()
    done = r3("convert", "--to", "r3", "--force", whole)
    assert done.status == 2
    assert "which is an input" in done.err
    assert whole.read_bytes() == before


def test_two_inputs_never_meet_in_one_output(r3, folder):
    (folder / "other").mkdir()
    twin = folder / "other" / "whole.safetensors"
    twin.write_bytes((folder / "whole.safetensors").read_bytes())
    (folder / "out").mkdir()
    files = [folder / "whole.safetensors", twin]
    done = r3("convert", "--to", "npy", *files, "--output", folder / "out")
    assert done.status == 2
    assert list((folder / "out").iterdir()) == []
    assert r3("convert", "--to", "npy", *files, "--output", folder / "absent").status == 2


def test_a_batch_goes_on_behind_a_file_that_fails(r3, folder):
    done = r3("convert", "--to", "vllm", folder / "gaps.safetensors", folder / "whole.safetensors")
    assert done.status == 1
    assert "STEP_LOST" in done.err
    assert done.err.count("\n") == 1
    assert (folder / "whole.b64").exists()
    assert not (folder / "gaps.b64").exists()
    assert "whole.b64: 40 rows" in done.out
