"""Middleware that names the process which answers."""

import os
from typing import Any

HEADER = "x-process"


async def name_process(request: Any, call_next: Any) -> Any:
    """Add the header."""
    response = await call_next(request)
    response.headers[HEADER] = str(os.getpid())
    return response
