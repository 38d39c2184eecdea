"""A request whose rows the scheduler keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_r3_plugin.request_options import RequestOptions


@dataclass
class TrackedRequest:
    """A request whose rows are kept.

    Attributes:
        request: vLLM's own object.
        options: what its user asked for.
        sent: rows below this position have left.
        kept: rows below this position belong to tokens already emitted.
        incomplete: a row that was due is unrecorded.

    """

    request: Any
    options: RequestOptions
    sent: int = 0
    kept: int = 0
    incomplete: bool = False

    def __post_init__(self) -> None:
        self.sent = self.options.start

    @property
    def is_returned(self) -> bool:
        """Whether the user wants its rows at all."""
        return self.options.routing == "on"

    @property
    def leaves_with_each_output(self) -> bool:
        """Whether the front end may end the request by itself, on a stop string."""
        return self.is_returned and bool(self.request.sampling_params.stop)
