"""What a model's routing looks like to capture and replay, and what it costs in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared_schema.cli.checks import Check
from shared_schema.cli.doctor_vllm import EngineSizes
from shared_schema.cli.terminal import num_bytes, ranges, runs_of
from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout


def check_model(
    config: dict[str, Any], engine: EngineSizes | None, kv_tokens: int, micro_batch_tokens: int
) -> Iterator[Check]:
    """Check a Hugging Face ``config``, and say what capture and replay cost.

    ``engine`` are the sizes of the engine, where they are known; ``kv_tokens`` tokens fit its KV
    cache.
    """
    try:
        layout = RoutingLayout.from_hf_config(config)
    except RoutingSchemaError as error:
        yield _unknown(config, error)
        return
    layers = ranges(runs_of(layout.moe_layers))
    yield Check(
        "model",
        "ok",
        f"{layout.num_moe_layers} of {layout.num_hidden_layers} layers route ({layers}) to "
        f"{layout.top_k} of {layout.num_experts} experts; a row takes {layout.row_nbytes} bytes in "
        f"{layout.dtype.name}",
    )
    yield from _memory(layout.row_nbytes, engine or EngineSizes(), kv_tokens, micro_batch_tokens)


def _unknown(config: dict[str, Any], error: RoutingSchemaError) -> Check:
    text = config.get("text_config")
    keys = [*config, *(text if isinstance(text, dict) else ())]
    if any("experts" in key for key in keys):
        return Check(
            "model",
            "warning",
            f"{error}",
            "vLLM captures it all the same; give the trainer the layout by hand",
        )
    return Check(
        "model", "error", f"no experts: {error}", "record and replay mixture-of-experts models"
    )


def _memory(
    row: int, engine: EngineSizes, kv_tokens: int, micro_batch_tokens: int
) -> Iterator[Check]:
    step = num_bytes(engine.max_num_batched_tokens * row)
    yield Check(
        "memory-worker",
        "ok",
        f"{step} of device memory on each rank, less on pipeline stages, for a step of "
        f"{engine.max_num_batched_tokens:,} tokens, and {step} of pinned host memory for each step "
        "under way",
    )
    yield _memory_of_engine_core(row, engine, kv_tokens)
    yield Check(
        "memory-trainer",
        "ok",
        f"{num_bytes(micro_batch_tokens * row)} of device memory for each micro-batch of "
        f"{micro_batch_tokens:,} tokens on a rank that has all MoE layers, from its forward to its "
        "backward",
    )


def _memory_of_engine_core(row: int, engine: EngineSizes, kv_tokens: int) -> Check:
    whole_cache = f"{num_bytes(kv_tokens * row)} for the {kv_tokens:,} tokens of the KV cache"
    if engine.max_bytes is None:
        running = engine.max_num_seqs * engine.max_model_len
        return Check(
            "memory-engine-core",
            "ok",
            f"{whole_cache}, up to {num_bytes((kv_tokens + running) * row)} of host memory if "
            f"{engine.max_num_seqs:,} requests of {engine.max_model_len:,} tokens are under way; "
            'max_bytes in additional_config["r3"] limits it',
        )
    if engine.max_bytes >= kv_tokens * row:
        return Check(
            "memory-engine-core",
            "ok",
            f"{num_bytes(engine.max_bytes)} of host memory, as max_bytes says; {whole_cache}",
        )
    return Check(
        "memory-engine-core",
        "warning",
        f"max_bytes is {num_bytes(engine.max_bytes)}, expected {whole_cache}: requests that hit "
        "prefixes whose rows were given up return no routed experts",
        f"set max_bytes to {kv_tokens * row} or more",
    )
