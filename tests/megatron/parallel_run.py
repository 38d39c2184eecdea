"""What one rank of a parallel layout does and reports: replay, record, evaluate, replay again.

The oracle for rows is an identity tensor ``[B, S]`` of codes ``sample * S + position`` that goes
through the same functions of Megatron as the tokens: what a router's row holds is read from it.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from megatron_r3.controller import unwrapped
from shared_schema import RoutedExpertsBatch, RoutingLayout
from tests.megatron.foreign_routes import RouterWitness, foreign_routes
from tests.megatron.parallel_table import Layout
from tests.megatron.tiny_gpt import VOCAB, tiny_chunks, tiny_config, tiny_hybrid_chunks


@dataclass
class Part:
    """A rank's part of a tensor that all ranks make up together."""

    shape: tuple[int, ...]
    index: tuple[Any, ...]
    values: Tensor


@dataclass
class Step:
    """One pass over all micro-batches of this rank."""

    logits: dict[tuple[int, int], Part] = field(default_factory=dict)
    """By (micro-batch, call of the output layer)."""
    gradients: dict[str, list[Part]] = field(default_factory=dict)
    """By checkpoint key."""
    witnesses: list[RouterWitness] = field(default_factory=list)
    held: int = 0
    """Micro-batches whose routes were on the device behind the last backward."""

    def same_bits(self, other: "Step") -> bool:
        mine, theirs = [*self._parts()], [*other._parts()]
        return bool(mine) and all(
            torch.equal(a.values, b.values) for a, b in zip(mine, theirs, strict=True)
        )

    def _parts(self) -> Iterator[Part]:
        yield from self.logits.values()
        for parts in self.gradients.values():
            yield from parts


@dataclass
class Followed:
    """Rows of routers that had to follow the foreign routes, and those of them that did not."""

    rows: int = 0
    wrong: int = 0


@dataclass
class RankReport:
    """What the test process compares."""

    forward: Followed
    recompute: Followed
    evaluation: Followed
    not_native: int
    """Rows of routers of multi-token prediction that are not these routers' own choice."""
    foreign: Step
    """Logits and gradients under the foreign routes."""
    own_record_repeats: bool
    """Whether the replay of the recorded step has the same logits and gradients, bit for bit."""


class Rank:
    """A model on this rank, attached, and its share of the data."""

    def __init__(
        self, layout: Layout, first_sample: int = 0, distributed_optimizer: bool = False
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.transformer.module import Float16Module

        import megatron_r3

        self.layout = layout
        self.first_sample = first_sample
        self.config = tiny_config(**(layout.model.config | dict(layout.config)))
        self.config.finalize_model_grads_func = finalize_model_grads
        if layout.model.hybrid:
            self.chunks = tiny_hybrid_chunks(self.config, layout.model.hybrid)
        else:
            self.chunks = tiny_chunks(self.config, reference_attention=layout.packed)
        for chunk in self.chunks:
            fill_by_name(chunk)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
        self.wrapped = [
            DistributedDataParallel(
                self.config, ddp, Float16Module(self.config, c) if self.config.bf16 else c
            )
            for c in self.chunks
        ]
        routing = None
        if layout.model.hybrid:
            layers = range(len(layout.model.moe_layer_numbers))
            routing = RoutingLayout(16, 4, tuple(layers), len(layers))
        self.controller = megatron_r3.attach(self.wrapped, layout=routing, accept=layout.accept)
        dp = parallel_state.get_data_parallel_world_size()
        self.micro_batches = list(
            range(parallel_state.get_data_parallel_rank(), len(layout.micro_batches), dp)
        )

    def foreign_routes(self, micro_batch: int) -> RoutedExpertsBatch:
        lengths, _ = self.layout.micro_batches[micro_batch]
        first = self.first_sample + 10 * micro_batch
        return foreign_routes(self.controller.layout, lengths, first)

    def samples_of(self, gathered: RoutedExpertsBatch, micro_batch: int) -> RoutedExpertsBatch:
        """Routes of a micro-batch out of those of all that this data rank fed."""
        first = 2 * self.micro_batches.index(micro_batch)
        return gathered.select([first, first + 1])

    def feed(self, chunk: Any, micro_batch: int, routes: Any) -> None:
        lengths, width = self.layout.micro_batches[micro_batch]
        packed = packed_seq_params(width) if self.layout.packed else None
        self.controller.feed(
            chunk,
            routes,
            packed_seq_params=packed,
            host_lengths=lengths,
            seq_length=None if packed else width,
        )

    def step(self, routes: Any, forward_only: bool = False) -> Step:
        """Run Megatron's own schedule; ``routes`` of a micro-batch by its number."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        step = Step()
        # Backwards run in the order of forwards in each chunk of 1F1B and its interleaved form.
        step.witnesses = [
            RouterWitness(count_recomputes=True).watch(chunk.decoder) for chunk in self.chunks
        ]
        fed = [0] * len(self.chunks)

        def forward_step(_: Any, chunk: Any, return_schedule_plan: bool = False) -> Any:
            number = next(n for n, c in enumerate(self.chunks) if c is unwrapped(chunk))
            nth, fed[number] = fed[number], fed[number] + 1
            step.witnesses[number].micro_batch = nth
            micro_batch = self.micro_batches[nth]
            self.feed(chunk, micro_batch, routes and routes(micro_batch))
            with self._logits(self.chunks[number], micro_batch, step):
                if return_schedule_plan:
                    return self._forward(self.chunks[number].build_schedule_plan, micro_batch)
                return self._forward(chunk, micro_batch)

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
            chunk.train(not forward_only)
        virtual = len(self.chunks) > 1
        with contextlib.ExitStack() as left, torch.set_grad_enabled(not forward_only):
            for witness in step.witnesses:
                left.callback(witness.leave)
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[None] * len(self.chunks) if virtual else None,
                model=self.wrapped if virtual else self.wrapped[0],
                num_microbatches=len(self.micro_batches),
                seq_length=self.layout.micro_batches[0][1] * (2 if self.layout.packed else 1),
                micro_batch_size=1 if self.layout.packed else 2,
                forward_only=forward_only,
            )
        frames = [frame for chunk in self.controller._chunks for frame in chunk.calls.frames]
        step.held = sum(not frame.is_released for frame in frames)
        if not forward_only:
            step.gradients = gradients_by_name(self.chunks)
        return step

    def _forward(self, model: Any, micro_batch: int) -> Any:
        (_, width), batch = self.layout.micro_batches[micro_batch], 2
        generator = torch.Generator().manual_seed(micro_batch)
        tokens = torch.randint(0, VOCAB, (batch, width), generator=generator)
        positions = torch.arange(width).expand(batch, width)
        causal = torch.triu(torch.ones(width, width, dtype=torch.bool), 1)[None, None]
        stock_attention = self.config.context_parallel_size == 1 and not self.layout.packed
        mask = causal if stock_attention else None
        local = [context_parallel_share(x) for x in (tokens, positions, tokens.roll(-1, 1))]
        extra = {}
        if self.layout.packed:
            local = [x.reshape(1, -1) for x in local]
            extra = {"packed_seq_params": packed_seq_params(width)}
        losses = model(local[0], local[1], mask, labels=local[2], **extra)
        # Megatron multiplies by the context-parallel size and averages over data ranks.
        return losses, lambda output: (output.float().sum() / tokens.numel(), {})

    @contextlib.contextmanager
    def _logits(self, chunk: Any, micro_batch: int, step: Step) -> Iterator[None]:
        """Note what the output layer, where this chunk has one, gives for a micro-batch."""
        if not chunk.post_process:
            yield
            return
        from megatron.core import parallel_state

        codes = self._codes(micro_batch, sequence_parallel=False)
        rank = parallel_state.get_tensor_model_parallel_rank()

        def note(_: Any, __: Any, output: Any) -> None:
            logits = output[0].detach().flatten(0, 1).clone()
            columns = torch.arange(rank * logits.shape[1], (rank + 1) * logits.shape[1])
            call = sum(number == micro_batch for number, _ in step.logits)
            _, width = self.layout.micro_batches[micro_batch]
            step.logits[micro_batch, call] = Part(
                (2 * width, VOCAB), (codes[:, None], columns[None]), logits
            )

        hook = chunk.output_layer.register_forward_hook(note)
        yield
        hook.remove()

    def _codes(self, micro_batch: int, sequence_parallel: bool) -> Tensor:
        _, width = self.layout.micro_batches[micro_batch]
        identity = torch.arange(2 * width).view(2, width)
        return rows_of_routers(identity, self.layout.packed, sequence_parallel)

    def native_witnesses(self) -> list["NativeWitness"]:
        """On the routers of multi-token prediction."""
        return [NativeWitness(c.mtp) for c in self.chunks if getattr(c, "mtp_process", False)]

    def followed(self, step: Step, recompute: bool = False) -> Followed:
        """Compare what every router used in every call with the foreign routes."""
        followed = Followed()
        for witness in step.witnesses:
            layers = [
                self.layout.model.moe_layer_numbers.index(router.layer_number)
                for router in witness.routers
            ]
            seen = witness.recomputes if recompute else witness.forwards
            for (nth, local), used in seen.items():
                expected = self._expected(self.micro_batches[nth], layers[local])
                assert used.shape == expected.shape
                follow = expected.any(1)
                followed.rows += int(follow.sum())
                followed.wrong += int((used != expected)[follow].any(1).sum())
        return followed

    def _expected(self, micro_batch: int, layer: int) -> Tensor:
        """``[T, E]`` the experts of each row of this rank; none where the routes have no row."""
        _, width = self.layout.micro_batches[micro_batch]
        experts = torch.zeros(2, width, self.controller.layout.num_experts, dtype=torch.bool)
        for sample, routed in enumerate(self.foreign_routes(micro_batch)):
            ids = torch.from_numpy(routed.ids[:, layer].astype(np.int64))
            experts[sample, : len(ids)].scatter_(1, ids, True)
        codes = self._codes(micro_batch, self.config.sequence_parallel)
        return experts.flatten(0, 1)[codes]


def run_layout(layout: Layout) -> RankReport:
    """Replay foreign routes, record, evaluate under foreign routes, replay the record."""
    rank = Rank(layout)
    native = rank.native_witnesses()
    with rank.controller.schedule("replay"):
        foreign = rank.step(rank.foreign_routes)
    with rank.controller.schedule("record") as recording:
        recorded = rank.step(None)
    with rank.controller.schedule("replay"):
        evaluated = rank.step(rank.foreign_routes, forward_only=True)
    own = recording.gather()
    with rank.controller.schedule("replay"):
        repeated = rank.step(lambda number: rank.samples_of(own, number))
    report = RankReport(
        forward=rank.followed(foreign),
        recompute=rank.followed(foreign, recompute=True),
        evaluation=rank.followed(evaluated),
        not_native=sum(witness.wrong for witness in native),
        foreign=foreign,
        own_record_repeats=repeated.same_bits(recorded),
    )
    foreign.witnesses = []  # they hold the model
    return report


class NativeWitness:
    """Counts rows of routers that are not the top-k of the router's own logits."""

    def __init__(self, module: Any) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        self.wrong = 0
        for router in module.modules():
            if isinstance(router, TopKRouter):
                router.register_forward_hook(self._note)

    def _note(self, router: Any, args: Any, output: Any) -> None:
        with torch.no_grad():
            logits = router.gating(args[0]).flatten(0, -2)
        own = torch.zeros_like(output[1]).scatter_(1, logits.topk(router.topk).indices, True)
        self.wrong += int((own != output[1]).any(1).sum())


def context_parallel_share(tensor: Tensor) -> Tensor:
    """This rank's part of ``[B, S]``, cut by Megatron."""
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.utils import get_batch_on_this_cp_rank

    group: dict[str, Any] = {"cp_group": get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        group["is_hybrid_cp"] = False
    return get_batch_on_this_cp_rank({"tensor": tensor, "cu_seqlens": None}, **group)["tensor"]


def packed_seq_params(width: int) -> Any:
    """Of two samples of ``width`` tokens each, padding included."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, width, 2 * width], dtype=torch.int32)
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=width, max_seqlen_kv=width)


def rows_of_routers(identity: Tensor, packed: bool, sequence_parallel: bool) -> Tensor:
    """``[T]`` the code of each row of this rank, of ``[B, S]`` cut and ordered by Megatron."""
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    share = context_parallel_share(identity)
    rows = share.reshape(-1, 1) if packed else share.T.contiguous()
    return (scatter_to_sequence_parallel_region(rows) if sequence_parallel else rows).flatten()


def fill_by_name(chunk: Any) -> None:
    """Give every parameter values that depend on its checkpoint key alone, however it is cut."""
    for key, part in checkpoint_parts(chunk):
        generator = torch.Generator().manual_seed(crc32(key.encode()))
        whole = torch.randn(part.shape, generator=generator)
        whole = whole / part.shape[-1] ** 0.5 if "norm" not in key else 1 + whole / 10
        with torch.no_grad():
            part.values.copy_(whole[part.index])


def gradients_by_name(chunks: list[Any]) -> dict[str, list[Part]]:
    """The reduced gradients that Megatron's DDP holds, by checkpoint key."""
    gradients: dict[str, list[Part]] = {}
    for chunk in chunks:
        weights = {parameter: parameter.data for parameter in chunk.parameters()}
        for parameter in weights:
            parameter.data = parameter.main_grad
        for key, part in checkpoint_parts(chunk):
            part.values = part.values.clone()
            gradients.setdefault(key, []).append(part)
        for parameter, data in weights.items():
            parameter.data = data
    return gradients


def checkpoint_parts(chunk: Any) -> Iterator[tuple[str, Part]]:
    """This rank's part of each tensor of a sharded checkpoint, as views of the parameters."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    data_ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = chunk.sharded_state_dict(metadata={"dp_cp_group": data_ranks})
    apply_factories(sharded)
    for tensor in nested_values(sharded):
        if isinstance(tensor, ShardedTensor):
            lead = tensor.prepend_axis_num
            index = (
                *tensor.global_offset[:lead],
                *(
                    slice(offset, offset + length)
                    for offset, length in zip(
                        tensor.global_offset[lead:], tensor.local_shape, strict=True
                    )
                ),
            )
            yield tensor.key, Part(tensor.global_shape, index, tensor.data.detach())
