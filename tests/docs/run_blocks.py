"""Runs the Python and console blocks of a Markdown file: `python -m tests.docs.run_blocks FILE`.

The conventions are written in CONTRIBUTING.md.
"""

import ast
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.docs.run_console import run_console

LANGUAGES = ("python", "console")
OURS = ("shared_schema", "vllm_r3_plugin", "megatron_r3")
SETUP = Path(__file__).parent / "setup"
FENCE = re.compile(r"^( *)```(\w*)")
NOT_RUN = re.compile(r"^ *<!-- not run: \S.* -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line, counted from 1."""

    language: str
    code: str
    line: int
    runs: bool


def code_blocks(text: str) -> list[Block]:
    """The Python and console blocks of a Markdown text in order."""
    blocks = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        number += 1
        if fence is None:
            continue
        first = number
        while lines[number].strip() != "```":
            number += 1
        if fence[2] in LANGUAGES:
            indent = len(fence[1])
            code = "\n".join(line[indent:] for line in lines[first:number])
            marked = first > 1 and NOT_RUN.match(lines[first - 2]) is not None
            blocks.append(Block(fence[2], code + "\n", first + 1, runs=not marked))
        number += 1
    return blocks


def compiled(block: Block, path: Path) -> Any:
    """Code object whose tracebacks name the lines of the Markdown file."""
    return compile("\n" * (block.line - 1) + block.code, str(path), "exec")


def check_imports(block: Block) -> None:
    """Import what the block imports from this project."""
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = import_module(str(node.module))
            for alias in node.names:
                getattr(module, alias.name)


def run(path: Path) -> None:
    """Run all blocks in one namespace, after the file's setup where there is one."""
    blocks = code_blocks(path.read_text())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    setup = SETUP / f"{path.stem.lower()}.py"
    if setup.exists():
        exec(compile(setup.read_text(), str(setup), "exec"), namespace)
    for block in blocks:
        if block.language == "console":
            if block.runs:
                run_console(block.code)
            continue
        code = compiled(block, path)
        if block.runs:
            exec(code, namespace)
        else:
            check_imports(block)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
