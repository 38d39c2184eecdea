"""What the documentation shows runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.run_blocks import SETUP, code_blocks

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    if code_blocks(page.read_text())
]


def run_blocks(page: Path) -> subprocess.CompletedProcess[str]:
    # A process for each page, since Megatron's CPU switch replaces parts of torch for good.
    return subprocess.run(
        [sys.executable, "-m", "tests.docs.run_blocks", str(page)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path) -> None:
    finished = run_blocks(page)
    assert finished.returncode == 0, finished.stderr


def test_every_setup_belongs_to_a_page() -> None:
    pages = {page.stem.lower() for page in PAGES}
    assert {setup.stem for setup in SETUP.glob("*.py")} <= pages


WRONG = {
    "a block that raises": "```python\nx = 1\n```\ntext\n```python\nassert x == 2\n```\n",
    "a syntax error": "<!-- not run: needs a GPU -->\n```python\nf(a=1, ...)\n```\n",
    "a command that prints something else": "```console\n$ r3 inspect absent\nall is well\n```\n",
    "a command that does not exist": "```console\n$ r3 dance\n...\n```\n",
    "a program that is not ours": "```console\n$ true\n```\n",
    "no reason": "<!-- not run: -->\n```python\nraise SystemExit(1)\n```\n",
    "a name we do not have": (
        "<!-- not run: needs a GPU -->\n```python\nfrom shared_schema import nothing\n```\n"
    ),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_page_fails_with(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert run_blocks(page).returncode != 0


def test_a_failure_names_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nraise ValueError(x)\n```\n")
    assert 'page.md", line 5' in run_blocks(page).stderr


def test_every_refusal_of_attach_is_explained() -> None:
    """In the table of the page about Megatron."""
    refusals = re.findall(
        r'    Refusal\(\n        "(\w+)"', (ROOT / "megatron_r3" / "refusals.py").read_text()
    )
    assert refusals
    page = (ROOT / "docs" / "megatron.md").read_text()
    assert [name for name in refusals if f"| `{name}` |" not in page] == []
