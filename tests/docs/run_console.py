"""Runs a console block of a page: each `$ r3 ...` must print what stands below it.

`...` stands for anything, and the amount of white space does not matter.
"""

import doctest
import glob
import io
import itertools
import os
import shlex
from contextlib import redirect_stderr, redirect_stdout

from shared_schema.cli import main

PROMPT = "$ "
LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_console(code: str) -> None:
    """Run the commands of a block in this process, in a terminal of 80 columns."""
    os.environ["COLUMNS"] = "80"
    lines = code.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith(PROMPT)]
    if not starts or starts[0]:
        raise ValueError(f"a console block begins with {lines[0]!r}, expected a command after '$ '")
    for start, stop in itertools.pairwise([*starts, len(lines)]):
        command = lines[start].removeprefix(PROMPT).strip()
        expected, seen = "".join(lines[start + 1 : stop]), output(command)
        if not doctest.OutputChecker().check_output(expected, seen, LENIENT):
            raise AssertionError(f"`{command}` printed\n{seen}\nexpected\n{expected}")


def output(command: str) -> str:
    """What `r3` prints, to both streams."""
    program, *words = shlex.split(command)
    if program != "r3":
        raise ValueError(f"a console block runs {program}, expected r3: say why it is not run")
    arguments = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
    if status not in (0, 1):
        raise AssertionError(f"`{command}` ended with status {status}\n{shown.getvalue()}")
    return shown.getvalue()
