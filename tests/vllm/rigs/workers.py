"""Worker classes for the tests, named on the command line as a user names his own."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_r3_plugin.seam_check import installed_release

from .lost_payloads import losing_payloads


class PipelineWorker(CPUWorker):
    """Makes eager pipeline stages run on CPU.

    vLLM 0.32 allocates a stage's input buffers in a warm-up that its CPU worker leaves out.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )


class ExpertParallelWorker(CPUWorker):
    """Makes data and expert parallelism run on CPU.

    vLLM 0.32 sets both up there, but its communicator lacks the two collectives of the dispatch,
    and its kernel looks up experts of other ranks in this rank's weights.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        CpuCommunicator.all_gatherv = _all_gatherv
        CpuCommunicator.reduce_scatterv = _reduce_scatterv
        CPUUnquantizedExperts.apply = _on_own_experts(CPUUnquantizedExperts.apply)
        super().load_model(*args, **kwargs)


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: Any = None) -> Any:
    """The ranks' tensors one after the other; `sizes` are their lengths."""
    assert dim == 0
    if isinstance(input_, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatterv(self: Any, input_: Any, dim: int = 0, sizes: Any = None) -> Any:
    """This rank's part of the ranks' sum; `sizes` are the lengths of the parts."""
    assert dim == 0
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    return total.split(sizes)[self.rank_in_group].contiguous()


def _on_own_experts(apply: Any) -> Any:
    """The kernel on this rank's experts alone; those of other ranks count nothing."""

    def apply_on_own_experts(self: Any, **kwargs: Any) -> None:
        if kwargs["expert_map"] is not None:
            local = kwargs["expert_map"][kwargs["topk_ids"].long()]
            kwargs["topk_weights"] = kwargs["topk_weights"] * (local >= 0)
            kwargs["topk_ids"] = local.clamp(min=0).to(kwargs["topk_ids"].dtype)
        apply(self, **kwargs)

    return apply_on_own_experts


class SpeculatingWorker(CPUWorker):
    """Makes speculation run on CPU.

    vLLM 0.30 puts the CPU's kernels under names that its rejection sampler no longer looks up; the
    one that repeats each request's values takes integers alone.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        from vllm.utils import cpu_triton_utils
        from vllm.v1.sample import rejection_sampler

        if installed_release() == (0, 30):
            rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens
            for name in (
                *("rejection_greedy_sample", "rejection_random_sample"),
                "sample_recovered_tokens",
            ):
                launcher = getattr(rejection_sampler, f"_{name}")
                launcher.kernel = getattr(cpu_triton_utils, f"{name}_kernel")
        super().load_model(*args, **kwargs)


def _expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """`x` [requests] repeated for each of their tokens; `cu_num_tokens` is their running sum."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    repeated = x.repeat_interleave(counts, output_size=num_tokens)
    return torch.where(repeated == replace_from, replace_to, repeated).to(x.dtype)


class RouterUpdate:
    """Worker extension: takes new weights for the routers, as a trainer sends them.

    vLLM 0.32's `reload_weights` leaves a CPU worker's experts in another layout than their kernel
    expects, so that no other implementation routes as the model does then.
    """

    model_runner: Any

    def load_routers(self, path: str) -> None:
        """From the checkpoint at `path`."""
        for name, weight in load_file(Path(path, "model.safetensors")).items():
            if name.endswith("mlp.gate.weight"):
                gate = self.model_runner.model.get_submodule(name.removesuffix(".weight"))
                gate.weight = torch.nn.Parameter(weight, requires_grad=False)
                gate.quant_method.process_weights_after_loading(gate)


class LossyWorker(CPUWorker):
    """Loses all payloads while it is told to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losing = ExitStack()

    def lose_payloads(self) -> None:
        self._losing.enter_context(losing_payloads(1.0))

    def keep_payloads(self) -> None:
        self._losing.close()
