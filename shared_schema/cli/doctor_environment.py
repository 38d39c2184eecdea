"""Whether this Python can run moe-r3, and which of the frameworks are there."""

from __future__ import annotations

import platform

from shared_schema.cli.checks import Check, installed_version


def check_environment() -> list[Check]:
    """Look at what is installed, without importing it."""
    own = installed_version("moe-r3")
    numpy, torch = installed_version("numpy"), installed_version("torch")
    return [
        Check("moe-r3", "ok", f"{own}, on Python {platform.python_version()} and numpy {numpy}")
        if own
        else Check(
            "moe-r3",
            "error",
            "imported, but not installed: vLLM cannot find its plugin",
            "pip install moe-r3 in this environment",
        ),
        Check("torch", "ok", torch)
        if torch
        else Check(
            "torch",
            "warning",
            "not installed: neither capture nor replay can run here",
            "install it with vLLM or Megatron",
        ),
    ]
