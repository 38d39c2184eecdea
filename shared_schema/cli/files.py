"""Reads the files that a command is given, in any format that :data:`FORMATS` knows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared_schema.cli.errors import CommandError, UsageError
from shared_schema.cli.terminal import track
from shared_schema.errors import RoutingSchemaError
from shared_schema.formats import FORMATS
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how input files are read."""
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FORMAT",
        choices=FORMATS,
        default="r3",
        help=f"format of the input: {', '.join(FORMATS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--layout",
        metavar="PATH",
        type=Path,
        help="the model, where the format does not say it: its folder, its config.json, or a JSON "
        "file with the fields of a RoutingLayout",
    )
    parser.add_argument(
        "--token-start",
        metavar="N",
        type=int,
        help="position of the first row, where the format does not say it (default: 0)",
    )
    parser.add_argument(
        "--layers",
        choices=("all", "moe"),
        help="what the layer axis lists, where both fit: all hidden layers or the MoE layers",
    )


def read_all(paths: list[Path], arguments: argparse.Namespace) -> list[RoutedExperts]:
    """Read every file, with a progress bar.

    Raises:
        CommandError: a file that cannot be read, by name.

    """
    layout = layout_of(arguments)
    return [read_one(path, arguments, layout) for path in track(paths, "reading")]


def read_one(
    path: Path, arguments: argparse.Namespace, layout: RoutingLayout | None
) -> RoutedExperts:
    """Read one file as :func:`add_reading_arguments` says.

    Raises:
        CommandError: it cannot be read, or is not what the format says.

    """
    try:
        return FORMATS[arguments.source].read_file(
            read_bytes(path), layout, token_start=arguments.token_start, layers=arguments.layers
        )
    except RoutingSchemaError as error:
        raise CommandError(f"{path}: {error}") from None


def layout_of(arguments: argparse.Namespace) -> RoutingLayout | None:
    """The layout that ``--layout`` names, if any.

    Raises:
        UsageError: none, but the format needs one.

    """
    if arguments.layout is not None:
        return read_layout(arguments.layout)
    if FORMATS[arguments.source].needs_layout:
        raise UsageError(
            f"format {arguments.source} does not say which model its rows are from, expected "
            "--layout: pass the model's folder or its config.json"
        )
    return None


def read_layout(path: Path) -> RoutingLayout:
    """Read a layout from a model's folder, its ``config.json``, or a layout's own fields.

    Raises:
        CommandError: not readable, or neither of these.

    """
    config = read_config(path)
    try:
        if "moe_layers" in config:
            return RoutingLayout.from_dict(config)
        return RoutingLayout.from_hf_config(config)
    except RoutingSchemaError as error:
        raise CommandError(f"{path}: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object, for a folder that of its ``config.json``.

    Raises:
        CommandError: not readable, or not a JSON object.

    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CommandError(
            f"{path} is not JSON ({error}), expected a model's config.json or a layout: check the "
            "path."
        ) from None
    if not isinstance(config, dict):
        raise CommandError(
            f"{path} holds a {type(config).__name__}, expected a JSON object: pass a model's "
            "config.json or a layout."
        )
    return config


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        CommandError: the operating system refuses.

    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(
            f"cannot read {path} ({error.strerror}), expected a file: check the path."
        ) from None
