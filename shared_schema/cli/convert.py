"""Convert files of routed experts from one format to another.

Each file holds one sequence. The result lies beside its source under the target format's suffix,
or where --output says. Nothing is overwritten without --force. A file that cannot be converted is
an error; the others are converted all the same.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

from shared_schema.cli.errors import CommandError, UsageError
from shared_schema.cli.files import add_reading_arguments, layout_of, read_one
from shared_schema.cli.terminal import num_bytes, print_json, track
from shared_schema.errors import RoutingSchemaError
from shared_schema.formats import FORMATS, Format
from shared_schema.layout import RoutingLayout

_FORMAT_LINES = "\n".join(
    textwrap.fill(
        f"  {f.name:<11} {f.suffix:<13} {f.summary}{'' if f.can_write else ' (read only)'}",
        width=79,
        subsequent_indent=" " * 28,
    )
    for f in FORMATS.values()
)

EPILOG = f"""\
formats:
{_FORMAT_LINES}

examples:
  r3 convert --from vllm --to r3 --layout Qwen3-30B-A3B answers/*.b64
  r3 convert --to npy rollout/000.safetensors --output /tmp/000.npy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``r3 convert``."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows of one sequence")
    add_reading_arguments(parser)
    writers = [f.name for f in FORMATS.values() if f.can_write]
    parser.add_argument(
        "--to",
        dest="target",
        metavar="FORMAT",
        choices=writers,
        required=True,
        help=f"format of the output: {', '.join(writers)}",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="a folder, or the file for a single input"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def run(arguments: argparse.Namespace) -> int:
    """Convert every file; 1 if one could not be converted."""
    layout = layout_of(arguments)
    target = FORMATS[arguments.target]
    targets = _targets(arguments, target)
    done: list[dict[str, Any]] = []
    for source in track(arguments.files, "converting"):
        try:
            done.append(_convert(source, targets[source], arguments, layout, target))
        except CommandError as error:
            done.append({"source": str(source), "error": str(error)})
    if arguments.json:
        print_json({"files": done})
    else:
        _show(done)
    return int(any("error" in one for one in done))


def _targets(arguments: argparse.Namespace, target: Format) -> dict[Path, Path]:
    """Where each source goes; refused before anything is written if two would meet."""
    sources = list(dict.fromkeys(arguments.files))
    output = arguments.output
    if output is None:
        targets = {source: source.with_suffix(target.suffix) for source in sources}
    elif output.is_dir():
        targets = {source: output / source.with_suffix(target.suffix).name for source in sources}
    elif len(sources) == 1:
        targets = {sources[0]: output}
    else:
        raise UsageError(
            f"--output is {output} for {len(sources)} files, expected a folder that exists: make it"
        )
    for source, path in targets.items():
        if path in targets:
            raise UsageError(
                f"{source} would be written to {path}, which is an input, expected another place: "
                "pass --output"
            )
    if len(set(targets.values())) < len(targets):
        raise UsageError(
            f"several files would be written to one in {output}, expected different names: convert "
            "them to different folders"
        )
    return targets


def _convert(
    source: Path,
    path: Path,
    arguments: argparse.Namespace,
    layout: RoutingLayout | None,
    target: Format,
) -> dict[str, Any]:
    routed = read_one(source, arguments, layout)
    try:
        content = target.write_file(routed)
    except RoutingSchemaError as error:
        raise CommandError(f"{source}: {error}") from None
    try:
        _write(path, content, overwrite=arguments.force)
    except FileExistsError:
        raise CommandError(
            f"{path} exists, expected a new file: pass --force to overwrite it."
        ) from None
    except OSError as error:
        raise CommandError(
            f"cannot write {path} ({error.strerror}), expected a place for a file: check the path."
        ) from None
    return {
        "source": str(source),
        "target": str(path),
        "rows": len(routed),
        "source_bytes": source.stat().st_size,
        "target_bytes": len(content),
    }


def _write(path: Path, content: bytes, overwrite: bool) -> None:
    """Write all of it or nothing; a file that is there stays until its successor is complete."""
    file = path.with_name(f".{path.name}.partial") if overwrite else path
    with file.open("wb" if overwrite else "xb") as writing:
        try:
            writing.write(content)
            writing.flush()
            if overwrite:
                file.replace(path)
        except OSError:
            file.unlink()
            raise


def _show(done: list[dict[str, Any]]) -> None:
    for one in done:
        if "error" in one:
            print(f"r3 convert: {one['error']}", file=sys.stderr)
        else:
            print(
                f"{one['source']} → {one['target']}: {one['rows']:,} rows, "
                f"{num_bytes(one['source_bytes'])} → {num_bytes(one['target_bytes'])}"
            )
