"""The controller of one model's replay: schedules, and the routes of each micro-batch."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_r3.attach_report import AttachReport
from megatron_r3.errors import ReplayStateError
from megatron_r3.frames import Frame
from megatron_r3.groups import Groups
from megatron_r3.layout_plan import LayoutPlan, Shard
from megatron_r3.local_routes import Routes
from megatron_r3.micro_batch_plan import micro_batch_plan
from megatron_r3.policies import Policies
from megatron_r3.replay_handle import ReplayHandle
from megatron_r3.router import restore_routers
from megatron_r3.router_calls import ChunkCalls, Mode
from megatron_r3.schedule import RecordedMicroBatch, Schedule
from megatron_r3.static_targets import StaticTargets
from shared_schema import RoutingLayout


class ModelChunk:
    """One model chunk of this rank, held weakly, and the calls of its routers."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        handles: Sequence[ReplayHandle],
        layers: Sequence[int],
        shard: Shard,
        policies: Policies,
        static: StaticTargets | None,
    ) -> None:
        self.static = static
        self.layers = tuple(layers)
        self.shard = shard
        self.calls = ChunkCalls(name, [handle.layer_number for handle in handles])
        self._module = weakref.ref(unwrapped(module))
        for local, handle in enumerate(handles):
            handle.bind(self.calls, local, policies, static)

    @property
    def module(self) -> torch.nn.Module | None:
        """The chunk without its wrappers, while it lives."""
        return self._module()


class Controller:
    """Feeds the routers of one model; made by :func:`megatron_r3.attach`.

    Attributes:
        report: the routers that were found.
        agreement_every: every so many micro-batches replayed routing is compared with native.
        policies: what replay means for padding, auxiliary loss and expert bias.

    """

    def __init__(
        self,
        chunks: Sequence[ModelChunk],
        report: AttachReport,
        agreement_every: int,
        policies: Policies,
        groups: Groups,
    ) -> None:
        self.report = report
        self.agreement_every = agreement_every
        self.policies = policies
        self._groups = groups
        self._chunks = tuple(chunks)

    @property
    def layout(self) -> RoutingLayout:
        """Layout of the routes that :meth:`feed` takes."""
        return self.report.layout

    @contextlib.contextmanager
    def schedule(self, mode: Mode) -> Iterator[Schedule]:
        """Record, replay or route natively in the forwards and backwards of the ``with`` block.

        A native schedule may stand inside another one, for a reference pass, say. Nothing stays
        armed behind the block, also when it is left by an exception.

        Args:
            mode: ``"record"``, ``"replay"`` or ``"native"``.

        Yields:
            the schedule, whose results are there when it has ended.

        Raises:
            ReplayStateError: one schedule inside another, or at the end frames that were not used
                as often as every router should.

        """
        calls = [chunk.calls for chunk in self._chunks]
        if mode not in ("record", "replay", "native"):
            raise ReplayStateError(
                f"the schedule is {mode!r}, expected 'record', 'replay' or 'native': name one."
            )
        if mode != "native" and any(c.schedule_is_open for c in calls):
            raise ReplayStateError(
                f"schedule({mode!r}) was opened inside another schedule, expected none or a "
                "native one inside: close the other one first."
            )
        static = [chunk.static for chunk in self._chunks if chunk.static is not None]
        if mode == "record" and static:
            raise ReplayStateError(
                "schedule('record') was opened with attach(graph_rows=...), expected a replay: "
                "attach without graph_rows to record, and run that pass outside of CUDA graphs."
            )
        run = Schedule(mode, self.layout, self._groups)
        for c in calls:
            c.open(mode)
        for targets in static:
            targets.clear()
        try:
            yield run
            if mode != "native":
                for c in calls:
                    c.check_balance()
                run.finish([(chunk.layers, chunk.calls.frames) for chunk in self._chunks])
        finally:
            for targets in static:
                targets.clear()
            for c in calls:
                c.close()

    def feed(
        self,
        chunk: torch.nn.Module,
        routes: Routes | RecordedMicroBatch | None = None,
        *,
        samples: Sequence[int] | None = None,
        packed_seq_params: Any = None,
        host_lengths: Sequence[int] | None = None,
        padded_lengths: Sequence[int] | None = None,
        seq_length: int | None = None,
        plan: LayoutPlan | None = None,
    ) -> None:
        """Say which routes the next forward of ``chunk`` uses; call it in ``forward_step``.

        A row that was not recorded, and the last token of each sample where it has none, routes
        natively, and so does padding. In a native schedule it does nothing.

        Routes leave the device when their last router call is over: behind the backward where a
        checkpoint recomputes, else behind the forward. So call it where gradients are enabled if a
        backward pass follows.

        Args:
            chunk: the model chunk that runs next, wrapped or not.
            routes: routes of the micro-batch, or of a batch that it is a part of: a
                ``RoutedExpertsBatch``, or for each sample ``RoutedExperts``, their encoded bytes,
                the path of a file of these, or ``None`` for none. Only this rank's rows and layers
                are read. ``recording[n]`` to repeat micro-batch n of a recording, for which nothing
                else is needed and nothing moves. None at all when recording.
            samples: which of ``routes`` the micro-batch consists of; by default all.
            packed_seq_params: of a packed (THD) micro-batch. ``local_cp_size`` and ``cp_group``
                in it stand in for the model's, and ``tokens_per_sample`` is followed.
            host_lengths: tokens of each sample. Needed for a padded batch, and for a packed one
                whose ``cu_seqlens`` lie on a GPU, since reading them would synchronise.
            padded_lengths: rows of each sample of a packed batch, where
                ``cu_seqlens_q_padded`` lies on a GPU.
            seq_length: padded length of a padded batch, or rows of the whole pack; by default
                the longest sample, or the samples' sum.
            plan: the map from rows to tokens, where the batch is laid out in another way; it says
                all that the arguments above say. ``shard(chunk)`` helps to make one.

        Raises:
            InvalidRoutesError: routes that do not fit the model or the micro-batch.
            ReplayStateError: no schedule is open, or the previous frame was not used.

        """
        target = self._chunk_of(chunk)
        calls = target.calls
        if not calls.schedule_is_open:
            raise ReplayStateError(
                "feed() was called outside a schedule, expected one: open ctl.schedule('replay'), "
                "'record' or 'native' around the forward and backward."
            )
        mode = calls.modes[-1]
        if mode == "native":
            return
        if (routes is None) == (mode == "replay"):
            raise ReplayStateError(
                f"feed() got {'no routes' if routes is None else 'routes'} in schedule({mode!r}), "
                "expected routes when replaying and none when recording: open the other schedule."
            )
        number = len(calls.frames)
        sample = self.agreement_every > 0 and number % self.agreement_every == 0
        sample = sample and target.static is None
        repeats = isinstance(routes, RecordedMicroBatch)
        if plan is None and not (repeats and packed_seq_params is None and host_lengths is None):
            plan = micro_batch_plan(
                packed_seq_params, host_lengths, padded_lengths, seq_length, target.shard
            )
        if isinstance(routes, RecordedMicroBatch):
            recorded = routes.frame(self._chunks.index(target), target.layers, plan)
            frame = Frame.to_repeat(recorded, number, sample, self.policies)
        elif routes is None:
            assert plan is not None
            device = next(chunk.parameters()).device
            frame = Frame.to_record(plan, self.layout, target.layers, number, device)
        else:
            assert plan is not None
            device = next(chunk.parameters()).device
            frame = Frame.to_replay(
                routes,
                samples,
                plan,
                self.layout,
                target.layers,
                number,
                device,
                sample,
                self.policies,
                self._groups,
            )
        if target.static is not None:
            target.static.load(frame)
        calls.push(frame)

    def shard(self, chunk: torch.nn.Module) -> Shard:
        """The part of the token axis that the routers of ``chunk`` see on this rank."""
        return self._chunk_of(chunk).shard

    def detach(self) -> None:
        """Give the model its routers back as they were before ``attach``."""
        for chunk in self._chunks:
            if chunk.module is not None:
                restore_routers(chunk.module)

    def _chunk_of(self, module: torch.nn.Module) -> ModelChunk:
        inner = unwrapped(module)
        for chunk in self._chunks:
            if chunk.module is inner:
                return chunk
        raise ReplayStateError(
            f"feed() got a {type(inner).__name__} that is none of the {len(self._chunks)} attached "
            "chunks, expected the chunk that forward_step was given: attach it first."
        )


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP, ``Float16Module`` and the like."""
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module
