"""Shell blocks name extras, targets, modules and arguments that exist."""

import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from shared_schema.cli import parser
from tests.docs.test_links import PAGES, ROOT

BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def check(line: str) -> None:
    """Raise if a command does not take this; commands of others are not looked at."""
    words = shlex.split(line, comments=True)
    match words:
        case ["pip", "install", *requirements]:
            for requirement in requirements:
                if extras := re.match(r"moe-r3\[(.*)\]$", requirement):
                    assert set(extras[1].split(",")) <= set(EXTRAS), line
        case ["make", *targets]:
            assert {target for target in targets if "=" not in target} <= set(TARGETS), line
        case [python, "-m", module, *_] if python.endswith("python"):
            assert find_spec(module), line
        case ["r3", *arguments]:
            parser().parse_args(arguments)
        case ["vllm", "serve", *arguments]:
            serve_parser().parse_args(arguments)


def serve_parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def lines(page: Path) -> list[str]:
    text = "".join(BLOCK.findall(page.read_text())).replace("\\\n", "")
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page in PAGES for line in lines(page)],
    ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else value[:60],
)
def test_a_shell_line_is_one_that_its_program_takes(page: Path, line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "pip install 'moe-r3[nothing]'",
        "make nothing",
        "python -m benchmarks.nothing",
        "r3 inspect --nothing",
        "vllm serve M --nothing",
    ],
)
def test_a_shell_line_that_its_program_does_not_take_is_found(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(line)
