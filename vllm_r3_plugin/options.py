"""Options of the plugin, in ``additional_config["r3"]``, where every process sees them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

PLUGIN_VERSION = version("moe-r3")
OPTIONS_KEY = "r3"

REQUEST_CHOICES = {
    "routing": ("on", "off"),
    "encoding": ("native", "r3"),
    "delivery": ("response", "fetch"),
    "unrecorded": ("omit", "sentinel"),
}
"""What a request may choose, and the server as its default; the first is the default's default."""


@dataclass(frozen=True)
class R3Options:
    """What a user may set, and the version that wrote it.

    Attributes:
        max_bytes: host memory of the engine core for routing rows, in bytes; ``None`` keeps as
            many rows as the KV cache has tokens, and those of all requests under way.
        backend: ``"r3"``, this package, or ``"vllm"``, which leaves vLLM's own implementation in
            place, with its own restrictions, for comparison; no other option counts then.
        routing: whether a request that does not say returns its routed experts: ``"on"`` or
            ``"off"``.
        encoding: what such a request returns: ``"native"``, vLLM's array, or ``"r3"``, the bytes
            that ``shared_schema.decode`` reads.
        delivery: how: in the ``"response"``, or by a ``"fetch"`` of a path that it names.
        unrecorded: what the native encoding does about a row that is not known: ``"omit"`` the
            array and say why, or mark the row by a ``"sentinel"``, the dtype's largest value.
        fetch_max_bytes: host memory for rows that wait to be fetched, in bytes.
        fetch_ttl_s: seconds for which they wait.
        version: of this package, where the engine was configured.

    """

    max_bytes: int | None = None
    backend: str = "r3"
    routing: str = "on"
    encoding: str = "native"
    delivery: str = "response"
    unrecorded: str = "omit"
    fetch_max_bytes: int = 4 << 30
    fetch_ttl_s: float = 300.0
    version: str = PLUGIN_VERSION

    def __post_init__(self) -> None:
        if self.max_bytes is not None:
            _require_positive("max_bytes", self.max_bytes, int, "number of bytes")
        _require_positive("fetch_max_bytes", self.fetch_max_bytes, int, "number of bytes")
        _require_positive("fetch_ttl_s", self.fetch_ttl_s, int | float, "number of seconds")
        for name, choices in {"backend": ("r3", "vllm"), **REQUEST_CHOICES}.items():
            require_choice(f"{name} in {_PLACE}", getattr(self, name), choices)

    @classmethod
    def of(cls, vllm_config: Any) -> R3Options:
        """Read them from an engine's configuration or arguments.

        Raises:
            ValueError: not a mapping, an unknown key or a wrong value.

        """
        given = (vllm_config.additional_config or {}).get(OPTIONS_KEY, {})
        if not isinstance(given, dict):
            raise ValueError(
                f"{_PLACE} is {given!r}, expected a mapping: pass for example "
                '{"r3": {"max_bytes": 1000000000}}.'
            )
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"{_PLACE} has the unknown key {unknown[0]!r}, expected only "
                f"{', '.join(sorted(cls.__dataclass_fields__))}: remove it."
            )
        return cls(**given)

    def store_in(self, vllm_config: Any) -> None:
        """Write them where all processes read them; the user's own mapping is not changed."""
        others = vllm_config.additional_config or {}
        vllm_config.additional_config = {**others, OPTIONS_KEY: asdict(self)}

    def require_version(self, found: str, host: str) -> None:
        """Raise unless ``host`` runs the version that configured the engine."""
        if found != self.version:
            raise ValueError(
                f"host {host} has moe-r3 {found}, expected {self.version} as where the engine was "
                "configured: install the same version on every node."
            )


_PLACE = f'additional_config["{OPTIONS_KEY}"]'


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value``, which the user knows as ``name``, is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}: pass one of these "
            "or leave it out."
        )


def _require_positive(name: str, value: Any, types: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise ValueError(
            f"{name} in {_PLACE} is {value!r}, expected a {what}: pass one or leave it out."
        )
    if not value > 0:
        raise ValueError(
            f"{name} in {_PLACE} is {value}, expected more than 0: pass a {what} or leave it out."
        )
