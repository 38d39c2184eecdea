import math
import subprocess
import sys
from statistics import fmean
from typing import Any

import pytest
import torch

from tests.megatron.gloo_pool import GlooPool

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "ep2_in_tp2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "etp2": {"expert_tensor_parallel_size": 2},
    "dp2": {},
}


def train_and_update(bf16: bool, overrides: dict[str, Any]) -> list[float]:
    """Two steps of Adam under DDP and the distributed optimizer; the mean loss of each."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from tests.megatron.tiny_gpt import tiny_chunks, tiny_config, train_step

    dtype = torch.bfloat16 if bf16 else torch.float32
    config = tiny_config(bf16=bf16, params_dtype=dtype, pipeline_dtype=dtype, **overrides)
    chunks: list[Any] = []
    for chunk in tiny_chunks(config):
        module = Float16Module(config, chunk) if bf16 else chunk
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        chunks.append(DistributedDataParallel(config, ddp, module))
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            bf16=bf16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            clip_grad=1.0,
        ),
        chunks,
    )
    steps = []
    for _ in range(2):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        steps += [fmean(losses)] if (losses := train_step(chunks)) else []
        updated, grad_norm, _ = optimizer.step()
        assert updated
        assert grad_norm > 0
    return steps


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_step_lowers_the_loss_in_every_layout(
    gloo_2: GlooPool, layout: str, dispatcher: str
) -> None:
    overrides = {"moe_token_dispatcher_type": dispatcher}
    ranks = gloo_2.run(train_and_update, False, overrides, **LAYOUTS[layout])
    reporting = [losses for losses in ranks if losses]
    assert all(math.isfinite(loss) for losses in reporting for loss in losses)
    assert all(losses == pytest.approx(reporting[0]) for losses in reporting)
    before, after = reporting[0]
    assert after < before


def test_a_bf16_model_trains_under_ddp_and_the_distributed_optimizer(gloo_2: GlooPool) -> None:
    for before, after in gloo_2.run(train_and_update, True, {}):
        assert after < before


FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def gradients(overrides: dict[str, Any]) -> list[torch.Tensor]:
    from megatron_r3 import cpu
    from tests.megatron.tiny_gpt import tiny_chunks, tiny_config, train_step

    cpu.seed(7)
    config = tiny_config(**overrides)
    chunks = [chunk.to(config.params_dtype) for chunk in tiny_chunks(config)]
    train_step(chunks)
    return [parameter.grad for chunk in chunks for parameter in chunk.parameters()]


def test_recompute_with_dropout_draws_the_same_random_numbers(gloo_2: GlooPool) -> None:
    dropout = {"hidden_dropout": 0.1}
    stored = gloo_2.run(gradients, dropout, tensor_model_parallel_size=2)
    recomputed = gloo_2.run(gradients, dropout | FULL_RECOMPUTE, tensor_model_parallel_size=2)
    for rank in range(2):
        # Not bit for bit: without gradients 0.19.2 leaves the top-k unsorted, so sums differ.
        torch.testing.assert_close(recomputed[rank], stored[rank])


def test_overlapping_micro_batches_under_expert_parallelism_keeps_the_gradients(
    gloo_2: GlooPool,
) -> None:
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    plain = bf16 | {"moe_token_dispatcher_type": "alltoall"}
    overlapped = plain | {"overlap_moe_expert_parallel_comm": True}
    expected = gloo_2.run(gradients, plain, expert_model_parallel_size=2)
    actual = gloo_2.run(gradients, overlapped, expert_model_parallel_size=2)
    for rank in range(2):
        torch.testing.assert_close(actual[rank], expected[rank])


def test_enabling_twice_changes_nothing(world_of_one: None) -> None:
    from megatron_r3 import cpu

    norm, depth = torch.cuda.Stream, torch._C._len_torch_function_stack()
    cpu.enable()
    assert torch.cuda.Stream is norm
    assert torch._C._len_torch_function_stack() == depth


def test_cuda_devices_and_tensor_types_name_the_cpu(world_of_one: None) -> None:
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.zeros(1).cuda().device.type == "cpu"
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"


IMPORT_ONLY = """
import torch
before = dict(vars(torch.cuda))
import megatron_r3.cpu
assert dict(vars(torch.cuda)) == before
assert torch._C._len_torch_function_stack() == 0
import sys
assert not any(name.startswith("megatron.core") for name in sys.modules)
"""

VISIBLE_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "H200"
import megatron_r3.cpu
megatron_r3.cpu.enable()
"""


def test_importing_the_switch_does_nothing() -> None:
    subprocess.run([sys.executable, "-c", IMPORT_ONLY], check=True)


def test_the_switch_refuses_a_visible_gpu() -> None:
    run = subprocess.run([sys.executable, "-c", VISIBLE_GPU], capture_output=True, text=True)
    assert run.returncode != 0
    assert "found the CUDA GPU 'H200' where it expects none" in run.stderr
