"""What trainers do to a model besides training works while replay is attached to it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_r3
from tests.megatron.gloo_pool import GlooPool
from tests.megatron.micro_batches import padded_micro_batches
from tests.megatron.test_foreign_routes import assert_used, layout_of, replay_foreign
from tests.megatron.test_own_record import RECOMPUTE
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config

# As a weights' bridge finds how a layer is cut, by the exact name of its class.
CUT_OF_CLASS = {
    "VocabParallelEmbedding": 0,
    "ColumnParallelLinear": 0,
    "RowParallelLinear": 1,
    "TopKRouter": None,
    "RMSNorm": None,
}


def build(**overrides: Any) -> Any:
    [model] = tiny_chunks(tiny_config(**overrides))
    return model


def export(model: Any) -> dict[str, Tensor]:
    """Whole weights by name, put together over tensor parallelism as a bridge does."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    weights = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            cut, whole = CUT_OF_CLASS[type(module).__name__], parameter.detach()
            if cut is not None:
                parts = [torch.empty_like(whole) for _ in range(group.size())]
                torch.distributed.all_gather(parts, whole.contiguous(), group=group)
                whole = torch.cat(parts, cut)
            weights[f"{path}.{name}"] = whole.clone()
    return weights


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def export_and_checkpoint(folder: Path) -> None:
    """Export and save attached, load attached and not, on two tensor-parallel ranks."""
    from megatron.core import dist_checkpointing, parallel_state

    def sharded(model: Any) -> Any:
        data_ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {"model": model.sharded_state_dict(metadata={"dp_cp_group": data_ranks})}

    def load(model: Any, path: Path) -> None:
        loaded = dist_checkpointing.load(sharded(model), str(path))
        model.load_state_dict(loaded["model"], strict=False)

    model = build()
    classes = [type(module).__name__ for module in model.modules()]
    stock = export(model)
    folders = {name: folder / name for name in ("stock", "attached")}
    if torch.distributed.get_rank() == 0:
        for path in folders.values():
            path.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(sharded(model), str(folders["stock"]))
    megatron_r3.attach(model)
    assert [type(module).__name__ for module in model.modules()] == classes
    assert equal(export(model), stock)
    dist_checkpointing.save(sharded(model), str(folders["attached"]))

    keys = [set(dist_checkpointing.load_tensors_metadata(str(path))) for path in folders.values()]
    assert keys[0] == keys[1]
    for path in folders.values():
        for attached in (True, False):
            other = build()
            if attached:
                megatron_r3.attach(other)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            load(other, path)
            assert equal(export(other), stock)


def test_export_and_distributed_checkpoints_are_those_of_the_stock_model(
    gloo_2: GlooPool, tmp_path: Path
) -> None:
    gloo_2.run(export_and_checkpoint, tmp_path, tensor_model_parallel_size=2)


class LowRank(torch.nn.Module):
    """A frozen linear layer and a trained low-rank one beside it, as adapters wrap it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, (rows, columns) = base, base.weight.shape
        self.down = torch.nn.Parameter(torch.randn(4, columns) / columns**0.5)
        self.up = torch.nn.Parameter(torch.randn(rows, 4) / 10)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = self.base(hidden, *args, **kwargs)
        return output + hidden @ self.down.T @ self.up.T, bias


@pytest.mark.parametrize("first", ["attach", "adapt"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_adapters_train_under_replay(world_of_one: None, recompute: str, first: str) -> None:
    model, batches = build(**RECOMPUTE[recompute]), padded_micro_batches()
    controller = megatron_r3.attach(model) if first == "attach" else None
    model.requires_grad_(False)
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv = LowRank(layer.self_attention.linear_qkv)
        layer.self_attention.linear_proj = LowRank(layer.self_attention.linear_proj)
    # Without it a checkpoint of Megatron has no input with gradients and runs no backward.
    model.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(
        witness, batches, layout_of(model), {"none": 0, "full": 3, "selective": 3}[recompute]
    )
    for name, parameter in model.named_parameters():
        trained = name.endswith(("down", "up"))
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained


def test_weights_that_went_away_and_came_back_replay(world_of_one: None) -> None:
    model, batches = build(**RECOMPUTE["full"]), padded_micro_batches()
    controller = megatron_r3.attach(model)
    replay_foreign(model, batches, controller=controller)[0].leave()
    stored = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    for parameter in model.parameters():  # as a sleeping rollout engine makes room
        parameter.grad = None
        parameter.data.untyped_storage().resize_(0)
    for name, parameter in model.named_parameters():
        parameter.data.untyped_storage().resize_(stored[name].untyped_storage().nbytes())
        parameter.data.copy_(stored[name])
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(witness, batches, layout_of(model), 3)
    witness.leave()

    for parameter in model.parameters():  # as a trainer moves weights away and into new memory
        parameter.data = torch.empty(0)
    for name, parameter in model.named_parameters():
        parameter.data = stored[name].clone()
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(witness, batches, layout_of(model), 3)


def test_a_state_dict_goes_through_an_update_and_back(world_of_one: None) -> None:
    model, batches = build(), padded_micro_batches()
    controller = megatron_r3.attach(model)
    stored = copy.deepcopy({n: t for n, t in model.state_dict().items() if torch.is_tensor(t)})
    replay_foreign(model, batches, controller=controller)[0].leave()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    model.load_state_dict(stored, strict=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(witness, batches, layout_of(model), 0)
