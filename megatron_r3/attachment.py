"""Turn the routers of a built model into replaying ones, and back."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import Router, TopKRouter

from megatron_r3.attach_report import AttachedRouter, AttachReport
from megatron_r3.controller import Controller, ModelChunk, unwrapped
from megatron_r3.errors import LayoutMismatchError, ReplayStateError, UnsupportedRouterError
from megatron_r3.groups import groups_of
from megatron_r3.layout_plan import WHOLE, Shard
from megatron_r3.policies import AuxLoss, BiasCounts, Padding, Policies
from megatron_r3.refusals import REFUSALS, Refusal, refusals_of
from megatron_r3.router import ReplayTopKRouter, make_replaying, restore_routers, unfuse
from megatron_r3.static_targets import StaticTargets
from shared_schema import RoutingLayout

Chunks: TypeAlias = torch.nn.Module | Sequence[torch.nn.Module]


def install() -> None:
    """Make ``moe_enable_routing_replay`` build replaying routers from now on.

    Megatron imports no plugin, so the flag alone builds stock routers. ``attach`` is still what
    binds them to a controller. Safe to call twice; :func:`uninstall` undoes it.
    """
    stock_init = TopKRouter.__init__
    if hasattr(stock_init, "replaced_by_megatron_r3"):
        return

    @functools.wraps(stock_init)
    def init(self: TopKRouter, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        if self.config.moe_enable_routing_replay:
            make_replaying(self)
            self.router_replay.built_in = True

    init.replaced_by_megatron_r3 = stock_init  # type: ignore[attr-defined]
    TopKRouter.__init__ = init


def uninstall() -> None:
    """Undo :func:`install` for models that are built from now on."""
    TopKRouter.__init__ = getattr(
        TopKRouter.__init__, "replaced_by_megatron_r3", TopKRouter.__init__
    )


def attach(
    model_chunks: Chunks,
    *,
    layout: RoutingLayout | None = None,
    accept: Collection[str] = (),
    agreement_every: int = 16,
    padding: Padding = "native",
    aux_loss: AuxLoss = "live",
    bias_counts: BiasCounts = "all",
    graph_rows: int | None = None,
) -> Controller:
    """Make every router of the model replay, and return the controller that feeds them.

    Under pipeline parallelism every rank has to call it: routers are numbered by their global MoE
    ordinal, which is gathered over the pipeline. Routers of multi-token prediction stay native.

    Args:
        model_chunks: the model, or the chunks of this rank's virtual stages, wrapped or not.
        layout: of the routes; needed where Megatron's layer numbers are not those of the Hugging
            Face model, otherwise read from the config.
        accept: names of refusals to go on with, each explained in the error that names it.
        agreement_every: compare replayed with native routing in every so many micro-batches, since
            replay hides router bugs; it costs a top-k of up to 128 rows there. 0 switches it off.
        padding: how padding rows route in a replay: ``"native"``, or ``"spread"`` evenly over all
            experts, which costs no top-k.
        aux_loss: which experts the auxiliary load-balancing loss counts in a replay: those that
            the router would choose now (``"live"``, as Megatron does), the ``"replayed"`` ones, or
            none (``"off"``, no such loss). Its probabilities are live in any case.
        bias_counts: which rows the expert bias counts in a replay, by the experts that they used:
            ``"all"`` (as Megatron does), ``"tokens"`` without padding, or ``"replayed"`` ones only.
        graph_rows: rows of every micro-batch on a rank, where routers run inside CUDA graphs; then
            they read targets at fixed addresses. Attach before the capture. Nothing is sampled,
            recomputed or recorded in this way, and the policies above are Megatron's.

    Raises:
        UnsupportedRouterError: a router that cannot be replayed as it is configured.
        LayoutMismatchError: the model's MoE layers are not those of the layout.
        ReplayStateError: a controller is already attached.

    """
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else list(model_chunks)
    policies = Policies(padding, aux_loss, bias_counts)
    if graph_rows is not None:
        accept = {*accept, "cuda_graph"}
        if (aux_loss, bias_counts) != ("live", "all"):
            raise UnsupportedRouterError(
                f"aux_loss is {aux_loss!r} and bias_counts {bias_counts!r} with graph_rows, "
                "expected 'live' and 'all': the others are no fixed series of kernels."
            )
    unknown = set(accept) - {refusal.name for refusal in REFUSALS}
    if unknown:
        raise UnsupportedRouterError(
            f"accept has {sorted(unknown)}, expected names out of "
            f"{sorted(refusal.name for refusal in REFUSALS)}: correct them."
        )
    routers = [list(_decoder_routers(chunk)) for chunk in chunks]
    refusals = _refusals([router for _, router in chain(*routers)], accept)
    numbers = [router.layer_number for _, router in chain(*routers)]
    layout, ordinals = _ordinals(numbers, layout, chunks)
    for _, router in chain(*routers):
        _check_sizes(router, layout)

    replayed, native, model = [], list(_mtp_routers(chunks)), []
    for number, (chunk, named) in enumerate(zip(chunks, routers, strict=True)):
        handles, layers = [], []
        for name, router in sorted(named, key=lambda item: item[1].layer_number):
            accepted = refusals[id(router)]
            index = ordinals[router.layer_number]
            entry = AttachedRouter(
                name, number, router.layer_number, index, tuple(r.name for r in accepted)
            )
            if any(refusal.leaves_native for refusal in accepted):
                native.append(entry)
                continue
            replayed.append(entry)
            handles.append(make_replaying(router))
            layers.append(index)
            if any(refusal.name == "fused_router" for refusal in accepted):
                unfuse(router)
        shard = _shard(named[0][1]) if named else WHOLE
        static = None
        if graph_rows is not None:
            device = next(chunk.parameters()).device
            static = StaticTargets(len(handles), graph_rows, layout.top_k, device)
        model.append(ModelChunk(f"chunk {number}", chunk, handles, layers, shard, policies, static))
    report = AttachReport(layout, tuple(replayed), tuple(native))
    groups = groups_of([router for _, router in chain(*routers)])
    return Controller(model, report, agreement_every, policies, groups)


def detach(model_chunks: Chunks) -> None:
    """Give the model its routers back as they were before :func:`attach`.

    Routers that :func:`install` built stay replaying ones, bound to no controller.
    """
    for chunk in [model_chunks] if isinstance(model_chunks, torch.nn.Module) else model_chunks:
        restore_routers(chunk)


def _decoder_routers(chunk: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in chunk.named_modules():
        if isinstance(module, Router) and not is_mtp(name, module):
            yield name, module


def _mtp_routers(chunks: Sequence[torch.nn.Module]) -> Iterator[AttachedRouter]:
    for number, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            if isinstance(module, Router) and is_mtp(name, module):
                yield AttachedRouter(name, number, module.layer_number, None)


def is_mtp(name: str, router: Router) -> bool:
    """Whether the router called ``name`` in its chunk belongs to multi-token prediction."""
    # Releases before 0.17 do not tell the router; there the module path does.
    return getattr(router, "is_mtp_layer", False) or "mtp" in name.split(".")


def _refusals(routers: Sequence[Any], accept: Collection[str]) -> dict[int, list[Refusal]]:
    """The accepted refusals of each router; raises for those that are not."""
    found = {}
    complaints: dict[str, list[int]] = {}
    for router in routers:
        if not isinstance(router, TopKRouter):
            raise UnsupportedRouterError(
                f"layer {router.layer_number} has a {type(router).__name__}, expected a "
                "TopKRouter: only its routing asks for a target."
            )
        if isinstance(router, ReplayTopKRouter) and router.router_replay.calls is not None:
            raise ReplayStateError(
                f"the router of layer {router.layer_number} already belongs to a controller, "
                "expected none: detach that one first, or call megatron_r3.detach(model)."
            )
        found[id(router)] = refusals_of(router)
        for refusal in found[id(router)]:
            if refusal.name not in accept:
                text = (
                    f"{refusal.name}: the router {refusal.why}; "
                    f"accept={{'{refusal.name}'}} would {refusal.accepted}"
                )
                complaints.setdefault(text, []).append(router.layer_number)
    if complaints:
        raise UnsupportedRouterError(
            "routers cannot be replayed as they are configured: "
            + "; ".join(f"{text} (layers {numbers})" for text, numbers in complaints.items())
            + "."
        )
    return found


def _ordinals(
    numbers: list[int], layout: RoutingLayout | None, chunks: Sequence[torch.nn.Module]
) -> tuple[RoutingLayout, dict[int, int]]:
    """The layout of the routes and the global MoE ordinal of each layer number."""
    gathered = [numbers]
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if group is not None and group.size() > 1:
        gathered = [[] for _ in range(group.size())]
        torch.distributed.all_gather_object(gathered, numbers, group)
    everywhere = sorted(chain(*gathered))
    given = layout is not None
    if layout is None:
        layout = RoutingLayout.from_megatron_config(unwrapped(chunks[0]).config)
    if len(set(everywhere)) != len(everywhere) or len(everywhere) != layout.num_moe_layers:
        raise LayoutMismatchError(
            f"the model has MoE routers in layers {everywhere}, expected "
            f"{layout.num_moe_layers}, one for each MoE layer of the layout: attach all chunks of "
            "one model, and pass its layout."
        )
    if not given and everywhere != [layer + 1 for layer in layout.moe_layers]:
        raise LayoutMismatchError(
            f"the model has MoE routers in layers {everywhere}, expected "
            f"{[layer + 1 for layer in layout.moe_layers]} from its config: pass layout=, in the "
            "numbering of the rollout model."
        )
    return layout, {number: ordinal for ordinal, number in enumerate(everywhere)}


def _check_sizes(router: TopKRouter, layout: RoutingLayout) -> None:
    for name, own in (("num_experts", router.num_experts), ("top_k", router.topk)):
        if own != getattr(layout, name):
            raise LayoutMismatchError(
                f"the layout has {name} {getattr(layout, name)} instead of {own} in layer "
                f"{router.layer_number}, expected the layout of this model: pass the model's own."
            )


def _shard(router: TopKRouter) -> Shard:
    """The share of the token axis that the routers of this rank see."""
    sp = router.tp_group if router.config.sequence_parallel else None
    return Shard(
        cp_size=router.cp_group.size(),
        cp_rank=router.cp_group.rank(),
        sp_size=1 if sp is None else sp.size(),
        sp_rank=0 if sp is None else sp.rank(),
    )
