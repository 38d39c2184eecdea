"""Captures routed experts in vLLM and returns them in its outputs.

Installing the package is enough: vLLM loads :func:`register` itself, through the entry-point group
``vllm.general_plugins``, and ``--enable-return-routed-experts`` then works as documented, also
where vLLM's own implementation refuses.
"""

from __future__ import annotations

import logging

from vllm_r3_plugin.fetch_path import NotHeldError as NotHeldError
from vllm_r3_plugin.fetching import fetch as fetch
from vllm_r3_plugin.fetching import fetch_async as fetch_async

__all__ = ["NotHeldError", "fetch", "fetch_async", "register"]


def register() -> None:
    """Take over ``--enable-return-routed-experts``; may run any number of times, in any process.

    It never raises: an exception here would stop vLLM for everybody who has this package installed,
    with the flag off too.
    """
    try:
        from vllm_r3_plugin.engine_config import install

        install()
    except Exception as error:
        logging.getLogger("vllm.moe_r3").warning(
            "moe-r3 is not active, --enable-return-routed-experts is left to vLLM itself: %s: %s",
            type(error).__name__,
            error,
        )
