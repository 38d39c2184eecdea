"""Run the real megatron-core where there is no CUDA, for tests, demos and debugging.

Nothing happens at import. `enable()` stands in for what megatron-core takes from `torch.cuda`;
every name of megatron-core that it replaces is listed in `megatron_r3.seams.CPU_SEAMS`.
"""

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

_replaced = False
_thread = threading.local()


def enable() -> None:
    """Let megatron-core run on the CPU in this process; a second call does nothing.

    Call it before `initialize_model_parallel`, and in every thread that runs a model: the mapping
    of ``device="cuda"`` to the CPU is per thread, all else is per process. It cannot be undone, so
    keep what else needs `torch.cuda` (a vLLM engine, say) in a process of its own.

    Raises:
        RuntimeError: a CUDA GPU is visible, so its `torch.cuda` must not be replaced.

    """
    global _replaced
    if not _replaced:
        if torch.cuda.is_available():
            raise RuntimeError(
                f"megatron_r3.cpu.enable() found the CUDA GPU {torch.cuda.get_device_name()!r} "
                "where it expects none; do not call it on a GPU, or set CUDA_VISIBLE_DEVICES= "
                "before the process starts"
            )
        _replace_torch_cuda()
        _replace_megatron_parts()
        _replaced = True
    if not hasattr(_thread, "mode"):
        _thread.mode = _CudaToCpu()
        _thread.mode.__enter__()


def seed(value: int) -> None:
    """Seed the CPU generator and Megatron's RNG tracker; needs the model-parallel groups.

    Ranks of one pipeline stage draw alike where Megatron expects it, stages draw differently.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(value + 100 * parallel_state.get_pipeline_model_parallel_rank())


class _CudaToCpu(TorchFunctionMode):
    """Map CUDA devices, CUDA tensor types and pinned memory to the CPU's, for each torch call."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # The optimizers sort parameters by these names and know the CUDA ones only.
            return result.replace("torch.", "torch.cuda.")
        return result


class _Stream:
    """The one stream of the CPU: work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def wait_event(self, event: "_Event") -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    def synchronize(self) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: _Stream | None = None) -> None:
        pass

    def wait(self, stream: _Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _returning(value: Any = None) -> Callable[..., Any]:
    # A function for each name: torch.compile refuses one object under two names of torch.
    return lambda *args, **kwargs: value


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _replace_torch_cuda() -> None:
    stand_ins: dict[str, Any] = {
        "current_device": _returning(CPU),
        "set_device": _returning(),
        "synchronize": _returning(),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _returning(_Stream()),
        "stream": _returning(contextlib.nullcontext()),
        "get_rng_state": _get_rng_state,
        "manual_seed": lambda seed: torch.manual_seed(seed),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.nvtx.range_push = _returning()
    torch.cuda.nvtx.range_pop = _returning()
    torch.Tensor.record_stream = _returning()


def _replace_megatron_parts() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    logging.getLogger(random.__name__).addFilter(
        lambda record: record.getMessage() != "CPU RNG state changed within GPU RNG context"
    )

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    moe_utils.maybe_move_tensor_to_cpu = _to_host
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host

    torch_norm.WrappedTorchNorm.__new__ = _sequence_parallel_norm(
        torch_norm.WrappedTorchNorm.__new__
    )


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _sequence_parallel_norm(stock_new: Callable[..., torch.nn.Module]) -> Callable[..., Any]:
    """Wrap `WrappedTorchNorm.__new__`: its gradients are then reduced over the TP group."""

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        accepted = copy.copy(config)
        accepted.sequence_parallel = False
        norm = stock_new(cls, accepted, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return new
