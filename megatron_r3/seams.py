"""Every symbol of megatron-core and torch that this package touches beyond documented API."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seam:
    """One place where this package relies on the inside of megatron-core or torch.

    ``symbol`` is ``module:attribute[.attribute...]``; ``versions`` are the releases of
    megatron-core on which it was checked; ``until`` says what would let it go; ``parameters`` are
    those that we pass or are passed by name.
    """

    symbol: str
    what: str
    why: str
    versions: tuple[str, ...]
    until: str
    parameters: tuple[str, ...] = ()


BOTH = ("0.16.1", "0.19.2")

# What `megatron_r3.cpu` replaces so that megatron-core runs where there is no CUDA.
CPU_SEAMS = (
    Seam(
        symbol="megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        what="replaced by a read of the CPU generator's state",
        why="the RNG tracker and activation checkpointing save the state of a CUDA generator",
        versions=BOTH,
        until="the RNG tracker takes its device from the parameters' device",
    ),
    Seam(
        symbol="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        what="replaced by a write of the CPU generator's state",
        why="the RNG tracker and activation checkpointing restore the state of a CUDA generator",
        versions=BOTH,
        until="the RNG tracker takes its device from the parameters' device",
    ),
    Seam(
        symbol="megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        what="its warning that the CPU generator moved inside a fork is dropped",
        why="without CUDA the forked generator is the CPU generator, so it always moves",
        versions=BOTH,
        until="the RNG tracker takes its device from the parameters' device",
    ),
    Seam(
        symbol="megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        what="accepts sequence_parallel and marks the weights with it",
        why="it refuses sequence parallelism, and the other norms of the local spec need Apex",
        versions=BOTH,
        until="WrappedTorchNorm marks its parameters for sequence parallelism itself",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction",
        what="the global `te_general_gemm` that it reads is set to None when it is missing",
        why="0.16.1 leaves the name undefined without Transformer Engine, a NameError in the gate",
        versions=BOTH,
        until="0.16.1 is no longer supported (0.19.2 defines the name)",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        what="converts to numpy when asked, also for a tensor that is on the CPU already",
        why="the all-to-all dispatcher passes the result on as split sizes, which must be a list",
        versions=BOTH,
        until="maybe_move_tensor_to_cpu honours as_numpy for CPU tensors",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        what="the same function under the name by which the dispatcher imported it",
        why="as above",
        versions=BOTH,
        until="as above",
    ),
)

# What the replay of routes relies on.
REPLAY_SEAMS = (
    Seam(
        symbol="megatron.core.transformer.moe.router:TopKRouter.__init__",
        what="wrapped by `install` so that the routers it builds replay",
        why="moe_enable_routing_replay builds a stock TopKRouter; Megatron imports no plugin",
        versions=BOTH,
        until="megatron-core builds the router class that its config names",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.router:TopKRouter.routing",
        what="overridden by `ReplayTopKRouter`: called, then checked that it asked for a target",
        why="fused kernels, sinkhorn and subclasses pass the target by without a word",
        versions=BOTH,
        until="megatron-core refuses these with routing replay itself",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.moe_utils:topk_routing_with_score_function",
        what="asks `router.router_replay.get_replay_topk` for the experts",
        why="it is the one place between scores and probabilities, for every score function",
        versions=BOTH,
        until="never: it is what routing replay hangs on",
        parameters=("router_replay",),
    ),
    Seam(
        symbol="megatron.core.transformer.moe.router_replay:RouterReplay.get_replay_topk",
        what="overridden; called for actions that are set by hand",
        why="frames answer in place of a target list",
        versions=BOTH,
        until="never: it is what routing replay hangs on",
        parameters=("scores", "topk", "num_groups", "group_topk", "default_compute_topk"),
    ),
    *(
        Seam(
            symbol=f"megatron.core.transformer.moe.router:TopKRouter.{name}",
            what="overridden for the policy of auxiliary losses: other counts, or no such loss",
            why="Megatron counts what the router would choose, also where other experts are used",
            versions=BOTH,
            until="megatron-core lets the caller say which experts auxiliary losses count",
            parameters=parameters,
        )
        for name, parameters in (
            ("is_aux_loss_enabled", ()),
            ("_apply_aux_loss", ("probs", "scores_for_aux_loss", "routing_map")),
            ("_apply_seq_aux_loss", ("probs", "scores_for_aux_loss", "routing_map")),
            ("_apply_global_aux_loss", ("probs", "scores_for_aux_loss", "routing_map")),
        )
    ),
    Seam(
        symbol="megatron.core.transformer.moe.router:TopKRouter._apply_expert_bias",
        what="overridden for the policy of the expert bias: rows are taken out of the map",
        why="padding counts too, and a padding mask fails (megatron-core #6111)",
        versions=BOTH,
        until="megatron-core takes the rows to be counted, and a padding mask works",
        parameters=("routing_map", "padding_mask"),
    ),
    Seam(
        symbol="megatron.core.transformer.moe.moe_utils:group_limited_topk",
        what="called for the rows that route natively",
        why="the choice handed to get_replay_topk is bound to the rows of the whole call",
        versions=BOTH,
        until="default_compute_topk takes scores of any number of rows",
        parameters=("scores", "topk", "num_tokens", "num_experts", "num_groups", "group_topk"),
    ),
    Seam(
        symbol="megatron.core.transformer.moe.token_dispatcher:_DeepepManager.setup_metadata",
        what="known to select again on the probabilities, so that none may be 0",
        why="a replayed expert whose probability underflows would lose its place",
        versions=BOTH,
        until="the manager reads the routing map",
        parameters=("routing_map", "probs"),
    ),
    Seam(
        symbol="megatron.core.transformer.moe.router_replay:RouterReplay.set_target_indices",
        what="overridden: called, then a mask of rows is queued beside the target",
        why="frameworks pass replay_mask, and the recompute has to repeat native rows",
        versions=BOTH,
        until="megatron-core takes a mask of rows",
        parameters=("topk_indices",),
    ),
    Seam(
        symbol="megatron.core.transformer.moe.router_replay:RouterReplay.record_indices",
        what="overridden: records into a static buffer where one is set",
        why="0.16.1 has no static buffers, which frameworks of later releases set",
        versions=BOTH,
        until="0.16.1 is no longer supported",
        parameters=("topk_indices",),
    ),
    Seam(
        symbol=(
            "megatron.core.transformer.moe.router_replay:"
            "RouterReplay.global_router_replay_instances"
        ),
        what="our handle stands in it where the stock one stood",
        why="frameworks drive all routers through this list",
        versions=BOTH,
        until="megatron-core addresses routers by model",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.router_replay:RouterReplayAction",
        what="the actions that are set by hand, known by their values",
        why="frameworks set them, some from enums of their own",
        versions=BOTH,
        until="never: it is the API that frameworks use",
    ),
    Seam(
        symbol="megatron.core.packed_seq_params:PackedSeqParams",
        what="lengths of a pack, and its own context-parallel group, are read from it",
        why="it is what a trainer hands to the model of a packed micro-batch",
        versions=BOTH,
        until="never: it is how packs are described",
        parameters=("cu_seqlens_q", "cu_seqlens_q_padded", "local_cp_size", "cp_group"),
    ),
    Seam(
        symbol=(
            "megatron.core.transformer.transformer_layer:TransformerLayer._maybe_unflatten_for_moe"
        ),
        what="the order in which it brings rows before a MoE layer is followed",
        why="PackedSeqParams.tokens_per_sample turns [mbs * S, 1] into [S, mbs] before the router",
        versions=("0.19.2",),
        until="the rows of a pack keep their order in MoE layers",
    ),
    Seam(
        symbol="torch._C:_current_graph_task_id",
        what="tells a recompute from a forward",
        why="a mode that callers flip is wrong under interleaved and overlapped schedules",
        versions=BOTH,
        until="torch makes it public",
    ),
    Seam(
        symbol="torch._C:_current_autograd_node",
        what="its sequence number and name tell which forward a recompute repeats",
        why="micro-batches run backward in another order than forward",
        versions=BOTH,
        until="checkpoints hand their recompute an identity",
    ),
    Seam(
        symbol="torch._C:_autograd._top_saved_tensors_default_hooks",
        what="tells whether a non-reentrant checkpoint is around a forward",
        why="where none is, the routes of a micro-batch are given back right behind its forward",
        versions=BOTH,
        until="checkpoints hand their recompute an identity",
    ),
    Seam(
        symbol="torch._C:_autograd._get_sequence_nr",
        what="the number that a forward is remembered by",
        why="as above",
        versions=BOTH,
        until="as above",
    ),
)

SEAMS: tuple[Seam, ...] = (*CPU_SEAMS, *REPLAY_SEAMS)


def resolve(symbol: str) -> Any:
    """Return the object that ``module:attribute[.attribute...]`` names.

    Raises:
        RuntimeError: the installed megatron-core has no such symbol.

    """
    module, _, path = symbol.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        from megatron.core import __version__

        raise RuntimeError(
            f"megatron-core {__version__} has no {symbol} ({error}); "
            "install a release that this package supports, or report the release"
        ) from error
