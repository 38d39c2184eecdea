"""What holds for every command: help, one-sentence errors, exit status, what must be installed."""

import contextlib
import importlib
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shared_schema.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = ("inspect", "compare", "stats", "convert", "doctor")


def test_the_console_script_is_this_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["r3"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(r3, command):
    done = r3(command, "--help")
    assert done.status == 0
    assert f"\n  r3 {command}" in done.out
    assert "--json" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_help_of_all_names_each_command_and_the_exit_statuses(r3):
    done = r3("--help")
    assert done.status == 0
    assert all(f"\n    {command} " in done.out for command in COMMANDS)
    assert "exit status: 0 all is well, 1 an error or a finding, 2 a wrong command line" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("no-such-command",),
        ("inspect",),
        ("compare", "one"),
        ("stats", "--from", "no-such-format", "x"),
        ("convert", "x"),
        ("convert", "--to", "vllm-split", "x"),
        ("stats", "--from", "vllm", "x"),
        ("doctor", "--kv-tokens", "0"),
    ],
)
def test_a_wrong_command_line_is_status_2(r3, arguments):
    done = r3(*arguments)
    assert done.status == 2
    assert done.out == ""
    assert "usage: r3" in done.err


def bad_files(folder):
    whole = (folder / "whole.safetensors").read_bytes()
    altered = bytearray(whole)
    altered[-1] ^= 1
    contents = {"empty": b"", "text": b"hello, world", "short": whole[:-7], "altered": altered}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder, folder / "absent", *(folder / name for name in contents)]


@pytest.mark.parametrize("command", ["inspect", "compare", "stats", "convert"])
def test_a_bad_file_is_one_sentence_that_names_it(r3, folder, command):
    options = ["--to", "npy"] if command == "convert" else []
    for path in bad_files(folder):
        files = [path, folder / "whole.safetensors"] if command == "compare" else [path]
        done = r3(command, *options, *files)
        assert done.status == 1
        assert done.out == ""
        assert done.err.startswith(f"r3 {command}: ")
        assert str(path) in done.err
        assert done.err.count("\n") == 1
        assert ", expected " in done.err
        assert '"error":' in r3(command, *options, *files, "--json").out


@pytest.mark.parametrize("config", [b"", b"[]", b'{"model_type": "bert"}', b'{"moe_layers": [1]}'])
def test_a_bad_layout_is_one_sentence_that_names_it(r3, folder, config):
    path = folder / "layout.json"
    path.write_bytes(config)
    done = r3("inspect", "--layout", path, folder / "whole.safetensors")
    assert done.status == 1
    assert done.err.startswith(f"r3 inspect: {path}")
    assert done.err.count("\n") == 1


def test_the_layout_of_another_model_is_refused(r3, folder):
    layout = folder / "layout.json"
    layout.write_text(
        '{"num_experts": 8, "top_k": 4, "moe_layers": [1, 2, 3], "num_hidden_layers": 4}'
    )
    done = r3("inspect", "--layout", layout, folder / "whole.safetensors")
    assert done.status == 1
    assert "num_experts 16 instead of 8" in done.err


WITHOUT_EXTRA = """
import sys
for name in ("rich", "matplotlib"):
    sys.modules[name] = None
from shared_schema.cli import main
print(main(sys.argv[1:]))
"""


def test_json_needs_no_extra_and_tables_say_what_to_install(folder):
    def run(*arguments):
        command = [sys.executable, "-c", WITHOUT_EXTRA, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    file = folder / "whole.safetensors"
    done = run("stats", "--json", file)
    assert done.stderr == ""
    assert done.stdout.endswith("}\n0\n")
    for arguments, missing in [((), "rich"), (("--json", "--plot", "x.png"), "matplotlib")]:
        done = run("stats", file, *arguments)
        assert done.stdout.endswith("1\n")
        assert f"{missing} cannot be imported" in done.stderr
        assert "pip install 'moe-r3[cli]'" in done.stderr


def test_an_error_stands_below_what_is_left_of_the_progress_bar(folder):
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "shared_schema.cli", "stats", str(folder / "absent")]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    subprocess.run(command, stderr=terminal, stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of what a closed terminal shows
        while chunk := os.read(master, 4096):
            shown += chunk
    assert b"reading" in shown
    *_, last = shown.decode().strip().splitlines()
    assert re.fullmatch(r"(\x1b\[[\d?]*\w)*r3 stats: cannot read .* check the path\.", last)


def test_a_reader_that_stops_early_is_no_error(folder):
    command = [sys.executable, "-m", "shared_schema.cli", "inspect"]
    command += [str(folder / "whole.safetensors")] * 300
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
