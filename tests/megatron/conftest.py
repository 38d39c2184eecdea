from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.megatron.gloo_pool import GlooPool


@pytest.fixture(scope="session")
def gloo_2() -> GlooPool:
    """Two gloo processes: `gloo_2.run(function, *args, tensor_model_parallel_size=2)`."""
    return GlooPool(2)


@pytest.fixture(scope="session")
def _groups_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made once: Megatron never ends a gloo group, and each has three threads."""
    import torch
    from megatron.core import parallel_state

    from megatron_r3 import cpu

    cpu.enable()
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def world_of_one(_groups_of_one: None) -> None:
    """This process as the only rank: gloo, model-parallel groups, CPU switch, seeded."""
    from megatron_r3 import cpu

    cpu.seed(1)


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Qwen3-MoE checkpoint: float32, 4 layers, the first one dense."""
    from tests.megatron.tiny_qwen3_moe import save_tiny_qwen3_moe

    return save_tiny_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"))
