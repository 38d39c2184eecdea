"""Checks the installed vLLM against the registry of the symbols that this package relies on."""

from __future__ import annotations

import importlib
import inspect
from functools import reduce
from typing import Any

from vllm_r3_plugin import seams
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.seams import Release, Seam

_NO_CODE = compile("", "", "exec")


def release_of(version: str) -> Release:
    """Major and minor number of ``version``, as 0.32 of ``0.32.0+cpu``."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def installed_release() -> Release:
    """The release of the installed vLLM."""
    from vllm import __version__

    return release_of(__version__)


def missing() -> list[Seam]:
    """The seams that the installed vLLM lacks."""
    release = installed_release()
    return [seam for seam in seams.SEAMS if seam.applies_to(release) and not _exists(seam)]


def require_present(journal: Journal) -> None:
    """Raise unless the installed vLLM has every seam; say so if the plugin never ran on it.

    Raises:
        ValueError: names all symbols that are missing.

    """
    release = installed_release()
    absent = missing()
    if absent:
        names = ", ".join(seam.symbol for seam in absent)
        raise ValueError(
            f"vLLM {_number(release)} has no {names}, or not as moe-r3 needs it for: "
            f"{absent[0].why}, expected vLLM {releases_named(seams.EXECUTED_ON)}: install one of "
            "them, or remove --enable-return-routed-experts."
        )
    if release not in seams.EXECUTED_ON:
        journal.note(
            "UNTESTED_VLLM",
            f"this moe-r3 never ran on vLLM {_number(release)}, only on "
            f"{releases_named(seams.EXECUTED_ON)}; all that it uses of vLLM is there, so it tries",
        )


def releases_named(releases: tuple[Release, ...]) -> str:
    """``0.30, 0.31 or 0.32``."""
    *most, last = map(_number, releases)
    return f"{', '.join(most)} or {last}" if most else last


def _number(release: Release) -> str:
    return ".".join(map(str, release))


def resolve(symbol: str) -> Any:
    """The object that ``module:attribute.attribute`` names.

    Raises:
        ImportError: no such module.
        AttributeError: no such attribute in it.

    """
    module, _, attributes = symbol.partition(":")
    return reduce(getattr, attributes.split("."), importlib.import_module(module))


def _exists(seam: Seam) -> bool:
    try:
        found = resolve(seam.symbol)
    except (ImportError, AttributeError):
        return False
    return not missing_attributes(found, seam.attributes) and _takes(found, seam.parameters)


def _takes(found: Any, parameters: tuple[str, ...]) -> bool:
    # `inspect` looks through our own wraps.
    return (
        not parameters
        or tuple(inspect.signature(found).parameters)[: len(parameters)] == parameters
    )


def missing_attributes(cls: Any, names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that no class in the hierarchy of ``cls`` defines, declares or assigns."""
    if not names:
        return []
    known: set[str] = set()
    for base in cls.__mro__:
        known.update(vars(base), getattr(base, "__annotations__", ()))
        for method in ("__init__", "__post_init__"):
            if method in vars(base):
                code = getattr(inspect.unwrap(vars(base)[method]), "__code__", _NO_CODE)
                known.update(code.co_names)
    return [name for name in names if name not in known]
