"""Typed routed-experts data shared by the rollout engine and the trainer.

Imports numpy and small pure libraries; neither torch nor vLLM nor Megatron.
"""

from shared_schema.batch import RoutedExpertsBatch as RoutedExpertsBatch
from shared_schema.codec import decode as decode
from shared_schema.codec import encode as encode
from shared_schema.errors import RoutingSchemaError as RoutingSchemaError
from shared_schema.formats.vllm import from_vllm_base64 as from_vllm_base64
from shared_schema.formats.vllm import from_vllm_native as from_vllm_native
from shared_schema.formats.vllm import to_vllm_native as to_vllm_native
from shared_schema.layout import RoutingLayout as RoutingLayout
from shared_schema.merging import merge as merge
from shared_schema.merging import splice as splice
from shared_schema.routed_experts import RoutedExperts as RoutedExperts
from shared_schema.routed_experts import RowStatus as RowStatus
from shared_schema.routed_experts import Source as Source
from shared_schema.routed_experts import Span as Span
from shared_schema.routed_experts import concatenate as concatenate

__all__ = [
    "RoutedExperts",
    "RoutedExpertsBatch",
    "RoutingLayout",
    "RoutingSchemaError",
    "RowStatus",
    "Source",
    "Span",
    "concatenate",
    "decode",
    "encode",
    "from_vllm_base64",
    "from_vllm_native",
    "merge",
    "splice",
    "to_vllm_native",
]
