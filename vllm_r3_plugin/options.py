"""Options of the plugin, in ``additional_config["r3"]``, where every process sees them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

PLUGIN_VERSION = version("moe-r3")
OPTIONS_KEY = "r3"


@dataclass(frozen=True)
class R3Options:
    """What a user may set, and the version that wrote it.

    Attributes:
        max_bytes: host memory of the engine core for routing rows, in bytes; ``None`` keeps as
            many rows as the KV cache has tokens, and those of all requests under way.
        version: of this package, where the engine was configured.

    """

    max_bytes: int | None = None
    version: str = PLUGIN_VERSION

    def __post_init__(self) -> None:
        value = self.max_bytes
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(
                f'max_bytes in additional_config["r3"] is {value!r}, expected a number of bytes: '
                "pass an integer or leave it out."
            )
        if value is not None and value <= 0:
            raise ValueError(
                f'max_bytes in additional_config["r3"] is {value}, expected more than 0: pass a '
                "number of bytes or leave it out."
            )

    @classmethod
    def of(cls, vllm_config: Any) -> R3Options:
        """Read them from an engine's configuration.

        Raises:
            ValueError: not a mapping, an unknown key or a wrong value.

        """
        given = (vllm_config.additional_config or {}).get(OPTIONS_KEY, {})
        if not isinstance(given, dict):
            raise ValueError(
                f'additional_config["r3"] is {given!r}, expected a mapping: pass for example '
                '{"r3": {"max_bytes": 1000000000}}.'
            )
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f'additional_config["r3"] has the unknown key {unknown[0]!r}, expected only '
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
