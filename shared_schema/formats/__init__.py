"""Readers and writers of every format in which routed experts are found today.

One file for each format. :data:`FORMATS` reads and writes them all in one way.
"""

from shared_schema.formats.arrays import Layers as Layers
from shared_schema.formats.arrays import from_array as from_array
from shared_schema.formats.arrays import to_array as to_array
from shared_schema.formats.fireworks import from_fireworks as from_fireworks
from shared_schema.formats.fireworks import to_fireworks as to_fireworks
from shared_schema.formats.nemo_rl import from_nemo_rl as from_nemo_rl
from shared_schema.formats.nemo_rl import to_nemo_rl as to_nemo_rl
from shared_schema.formats.nested import from_nested as from_nested
from shared_schema.formats.nested import to_nested as to_nested
from shared_schema.formats.registry import FORMATS as FORMATS
from shared_schema.formats.registry import Format as Format
from shared_schema.formats.sglang import from_sglang as from_sglang
from shared_schema.formats.sglang import to_sglang as to_sglang
from shared_schema.formats.skyrl import from_prime_rl as from_prime_rl
from shared_schema.formats.skyrl import from_skyrl as from_skyrl
from shared_schema.formats.skyrl import to_prime_rl as to_prime_rl
from shared_schema.formats.skyrl import to_skyrl as to_skyrl
from shared_schema.formats.slime import from_slime as from_slime
from shared_schema.formats.slime import to_slime as to_slime
from shared_schema.formats.verl import from_verl as from_verl
from shared_schema.formats.verl import to_verl as to_verl
from shared_schema.formats.vllm import from_vllm_base64 as from_vllm_base64
from shared_schema.formats.vllm import from_vllm_native as from_vllm_native
from shared_schema.formats.vllm import from_vllm_split as from_vllm_split
from shared_schema.formats.vllm import to_vllm_base64 as to_vllm_base64
from shared_schema.formats.vllm import to_vllm_native as to_vllm_native
from shared_schema.formats.vllm import to_vllm_split as to_vllm_split

__all__ = [
    "FORMATS",
    "Format",
    "Layers",
    "from_array",
    "from_fireworks",
    "from_nemo_rl",
    "from_nested",
    "from_prime_rl",
    "from_sglang",
    "from_skyrl",
    "from_slime",
    "from_verl",
    "from_vllm_base64",
    "from_vllm_native",
    "from_vllm_split",
    "to_array",
    "to_fireworks",
    "to_nemo_rl",
    "to_nested",
    "to_prime_rl",
    "to_sglang",
    "to_skyrl",
    "to_slime",
    "to_verl",
    "to_vllm_base64",
    "to_vllm_native",
    "to_vllm_split",
]
