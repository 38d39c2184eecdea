"""One line of ``r3 doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What was looked at and what was found.

    Attributes:
        name: stable, for programs.
        status: an error keeps capture or replay from working here.
        message: what was found.
        fix: what to do about it; empty where all is well.

    """

    name: str
    status: Literal["ok", "warning", "error"]
    message: str
    fix: str = ""


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, if it is installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def sentence_of(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
