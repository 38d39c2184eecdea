"""Every format by name, with one way to read and to write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from shared_schema.codec import decode, encode
from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, from_array, to_array
from shared_schema.formats.fireworks import from_fireworks, to_fireworks
from shared_schema.formats.nemo_rl import from_nemo_rl, to_nemo_rl
from shared_schema.formats.nested import from_nested, to_nested
from shared_schema.formats.sglang import from_sglang, to_sglang
from shared_schema.formats.skyrl import from_prime_rl, from_skyrl, to_prime_rl, to_skyrl
from shared_schema.formats.vllm import (
    dump_npy,
    from_vllm_base64,
    load_npy,
    read_split_fields,
    to_vllm_base64,
)
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts


@dataclass(frozen=True)
class Format:
    """How one engine or trainer writes the routed experts of one sequence.

    Attributes:
        name: what the command line calls it.
        summary: one line for lists of formats.
        suffix: of a file that holds one sequence.
        needs_layout: whether a reader has to bring the model's layout.
        says_layers: whether the format fixes what the layer axis means.

    """

    name: str
    summary: str
    suffix: str
    _reader: Callable[..., RoutedExperts]
    _writer: Callable[[RoutedExperts], Any] | None
    _load: Callable[[bytes], Any]
    _dump: Callable[[Any], bytes]
    needs_layout: bool = True
    says_layers: bool = False

    @property
    def can_write(self) -> bool:
        """Whether :meth:`write` works: rows alone suffice to write this format."""
        return self._writer is not None

    def read(
        self,
        data: Any,
        layout: RoutingLayout | None = None,
        *,
        token_start: int | None = None,
        layers: Layers | None = None,
    ) -> RoutedExperts:
        """Read the object that the engine or trainer hands out.

        Args:
            data: the object: text, mapping, array, bytes.
            layout: the model's layout; a source that states its own must state the same.
            token_start: position of the first row; ``None`` takes what the data says, or 0.
            layers: what the layer axis means; ``None`` takes what fits.

        Raises:
            RoutingSchemaError: anything else than this format and this model's rows.

        """
        if layout is None and self.needs_layout:
            raise RoutingSchemaError(
                f"format {self.name} does not say which model its rows are from, expected a "
                "layout: pass RoutingLayout.from_hf_config(config)."
            )
        if layers is not None and self.says_layers:
            raise RoutingSchemaError(
                f"layers is {layers!r}, expected None: format {self.name} lists the layers in one "
                "way only, leave it out."
            )
        options: dict[str, Any] = {"token_start": token_start, "layers": layers}
        options = {name: value for name, value in options.items() if value is not None}
        return self._reader(data, layout, **options)

    def write(self, routed: RoutedExperts) -> Any:
        """Write the object that the engine or trainer hands out.

        Raises:
            RoutingSchemaError: a row is unrecorded and this format cannot say so, or the format
                cannot be written from rows alone.

        """
        if self._writer is None:
            raise RoutingSchemaError(
                f"format {self.name} can only be read, expected one of "
                f"{', '.join(f.name for f in FORMATS.values() if f.can_write)}: it holds more than "
                "the rows."
            )
        return self._writer(routed)

    def read_file(
        self,
        content: bytes,
        layout: RoutingLayout | None = None,
        *,
        token_start: int | None = None,
        layers: Layers | None = None,
    ) -> RoutedExperts:
        """Read the content of a file; see :meth:`read`."""
        return self.read(self._load(content), layout, token_start=token_start, layers=layers)

    def write_file(self, routed: RoutedExperts) -> bytes:
        """Write the content of a file; see :meth:`write`."""
        return self._dump(self.write(routed))


def _read_r3(
    payload: Any, layout: RoutingLayout | None, token_start: int | None = None
) -> RoutedExperts:
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise RoutingSchemaError(
            f"the payload is a {type(payload).__name__}, expected bytes: pass the file's content."
        )
    routed = decode(payload, layout)
    if token_start not in (None, routed.token_start):
        raise RoutingSchemaError(
            f"token_start is {token_start}, expected {routed.token_start} as the payload says: "
            "leave it out."
        )
    return routed


def _text(content: bytes) -> str:
    try:
        return "".join(content.decode("ascii").split())  # base64 tools break lines
    except UnicodeDecodeError as error:
        raise RoutingSchemaError(
            f"the file of {len(content)} bytes is not ASCII text ({error}), expected it: check the "
            "format's name."
        ) from None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RoutingSchemaError(
            f"the file of {len(content)} bytes is not JSON ({error}), expected it: check the "
            "format's name."
        ) from None


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


_ALL = (
    Format(
        "r3",
        "this project's safetensors file, see FORMAT.md",
        ".safetensors",
        _read_r3,
        encode,
        bytes,
        bytes,
        needs_layout=False,
        says_layers=True,
    ),
    Format(
        "vllm",
        "vLLM 0.22 and later over HTTP: base64 of a .npy file, all hidden layers",
        ".b64",
        from_vllm_base64,
        to_vllm_base64,
        _text,
        str.encode,
        says_layers=True,
    ),
    Format(
        "vllm-split",
        "vLLM 0.21 over HTTP: JSON object of prompt_routed_experts and routed_experts",
        ".json",
        read_split_fields,
        None,
        _json,
        _to_json,
        says_layers=True,
    ),
    Format(
        "npy",
        "a .npy file of [tokens, layers, k] integers",
        ".npy",
        from_array,
        to_array,
        load_npy,
        dump_npy,
    ),
    Format(
        "sglang",
        "SGLang: base64 of flat int32, all hidden layers",
        ".b64",
        from_sglang,
        to_sglang,
        _text,
        str.encode,
    ),
    Format(
        "skyrl",
        "SkyRL: JSON object of data (base64), shape and dtype",
        ".json",
        from_skyrl,
        to_skyrl,
        _json,
        _to_json,
    ),
    Format(
        "prime-rl",
        "prime-rl: JSON object of data (base64), shape, start and dtype",
        ".json",
        from_prime_rl,
        to_prime_rl,
        _json,
        _to_json,
    ),
    Format(
        "nemo-rl",
        "NeMo RL: nrlre1:<dtype>:<shape>:<base64>, unrecorded rows -1",
        ".txt",
        from_nemo_rl,
        to_nemo_rl,
        _text,
        str.encode,
    ),
    Format(
        "fireworks",
        "Fireworks R3V1: base64 of a zstd frame, MoE layers, gaps as a bitmap",
        ".b64",
        from_fireworks,
        to_fireworks,
        _text,
        str.encode,
    ),
    Format(
        "nested",
        "JSON lists [tokens][layers][k]",
        ".json",
        from_nested,
        to_nested,
        _json,
        _to_json,
    ),
)

FORMATS: Mapping[str, Format] = MappingProxyType({f.name: f for f in _ALL})
"""The formats that :meth:`Format.read` and :meth:`Format.write` know, by name."""
