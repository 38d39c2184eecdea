"""What the pages about Megatron take for granted: a model, its micro-batches and its schedule."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r3 import cpu
from shared_schema import RoutingLayout
from tests.megatron.foreign_routes import foreign_routes
from tests.megatron.micro_batches import packed_micro_batches, use_reference_attention
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config


def start() -> None:
    """Make this process Megatron's only rank."""
    cpu.enable()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    cpu.seed(1)


def build_model() -> GPTModel:
    """A small GPTModel that takes packs."""
    (chunk,) = tiny_chunks(
        tiny_config(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    )
    return use_reference_attention(chunk)


def micro_batches() -> Iterator[SimpleNamespace]:
    """Packed micro-batches with foreign routes."""
    layout = RoutingLayout.from_megatron_config(tiny_config())
    for pack in packed_micro_batches():
        yield SimpleNamespace(
            tokens=pack.tokens,
            positions=torch.cat([torch.arange(room) for room in pack.rooms])[None],
            lengths=list(pack.lengths),
            psp=pack.packed_seq_params,
            routes=foreign_routes(layout, pack.lengths),
        )


def loss_function(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """A loss that needs no targets."""
    return logits.float().pow(2).mean(), {}


def forward_backward_func(**settings: Any) -> Any:
    """Megatron's schedule, over all micro-batches."""
    batches = list(micro_batches())
    run = partial(
        get_forward_backward_func(),
        data_iterator=iter(batches),
        num_microbatches=len(batches),
        seq_length=16,
        micro_batch_size=1,
        forward_only=False,
    )
    return run(**settings)
