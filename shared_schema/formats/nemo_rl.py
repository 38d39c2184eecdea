"""NeMo RL's envelope ``nrlre1:<dtype>:<T>x<layers>x<k>:<base64>``.

The dtype is int8, int16 or int32, the narrowest signed one for E; -1 in every slot marks a row
that is not known.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jaxtyping import UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, from_array, to_array
from shared_schema.formats.base64_text import array_to_base64, from_base64, integers_of
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts

_MAGIC = "nrlre1"
_HEADER = re.compile(rf"{_MAGIC}:(int8|int16|int32):(\d{{1,12}})x(\d{{1,6}})x(\d{{1,6}}):", re.A)


def from_nemo_rl(
    text: Any,
    layout: RoutingLayout,
    token_start: int = 0,
    *,
    layers: Layers | None = None,
    status: UInt8[np.ndarray, " T"] | None = None,
) -> RoutedExperts:
    """Read the envelope; rows of -1 are unrecorded (``MISSING``).

    Args:
        text: the envelope.
        layout: the model's layout.
        token_start: position of the first row.
        layers: what the layer axis means; ``None`` takes what its length fits.
        status: which rows are known; ``None`` takes rows of -1 as unrecorded.

    Raises:
        RoutingSchemaError: not such an envelope, or rows that break the schema.

    """
    header = _HEADER.match(text) if isinstance(text, str) else None
    if header is None:
        seen = repr(text[:40]) if isinstance(text, str) else f"a {type(text).__name__}"
        raise RoutingSchemaError(
            f"the envelope begins with {seen}, expected {_MAGIC}:<int8|int16|int32>:<tokens>x"
            "<layers>x<k>:<base64>: check that it is NeMo RL's."
        )
    dtype, *shape = header.groups()
    payload = from_base64(text[header.end() :])
    array = integers_of(payload, np.dtype(dtype), [int(n) for n in shape])
    return from_array(array, layout, token_start, layers=layers, status=status)


def to_nemo_rl(routed: RoutedExperts, *, layers: Layers = "moe") -> str:
    """Write the envelope, unrecorded rows as -1.

    >>> import numpy as np
    >>> from shared_schema import RoutingLayout
    >>> layout = RoutingLayout(num_experts=8, top_k=2, moe_layers=(1,), num_hidden_layers=2)
    >>> to_nemo_rl(RoutedExperts(np.array([[[5, 3]], [[0, 0]]]), layout, status=[0, 1]))
    'nrlre1:int8:2x1x2:BQP//w=='

    """
    largest = routed.layout.num_experts - 1
    dtype = np.int8 if largest < 1 << 7 else np.int16 if largest < 1 << 15 else np.int32
    array = to_array(routed, dtype, layers=layers, unrecorded=-1)
    shape = "x".join(str(n) for n in array.shape)
    return f"{_MAGIC}:{array.dtype.name}:{shape}:{array_to_base64(array)}"
