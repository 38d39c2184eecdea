"""The command ``r3``: looks at routed experts, converts them, and checks an installation."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from shared_schema.cli import compare, convert, doctor, inspect, stats
from shared_schema.cli.errors import CommandError, UsageError
from shared_schema.errors import RoutingSchemaError

_EPILOG = """\
exit status: 0 all is well, 1 an error or a finding, 2 a wrong command line

`r3 COMMAND --help` explains a command, with examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``r3``; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted; Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except UsageError as error:
        message, status = str(error), 2
    except (CommandError, RoutingSchemaError) as error:
        message, status = str(error), 1
    # Only now, when the exception is gone, is a progress bar that it broke off.
    if status == 2:
        arguments.parser.print_usage(sys.stderr)
    elif arguments.json:
        print(json.dumps({"error": message}))
    print(f"r3 {arguments.command}: {message}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="r3",
        description="Look at routed experts, convert them, and check an installation.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    width = min(shutil.get_terminal_size().columns - 2, 100)
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (inspect, compare, stats, convert, doctor):
        name = module.__name__.rpartition(".")[2]
        summary, _, rest = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{textwrap.fill(rest, width)}",
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON document instead")
        command.set_defaults(run=module.run, parser=command)
    return root
