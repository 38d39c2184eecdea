"""Every symbol of megatron-core that this package touches beyond its documented API."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seam:
    """One place where this package relies on the inside of megatron-core.

    ``symbol`` is ``module:attribute[.attribute...]``; ``versions`` are the releases of
    megatron-core on which it was checked; ``until`` says what would let it go.
    """

    symbol: str
    what: str
    why: str
    versions: tuple[str, ...]
    until: str


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

SEAMS: tuple[Seam, ...] = (*CPU_SEAMS,)


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
