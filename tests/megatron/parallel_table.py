"""The parallel layouts, models and schedules that replay is proven on: one row for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

TP, PP, CP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
VPP = "virtual_pipeline_model_parallel_size"

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# The first layer of each stage is recomputed, the others are not.
BLOCK = {
    "recompute_granularity": "full",
    "recompute_method": "block",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
OVERLAP_ACCEPTED = frozenset({"expert_parallel_overlap"})
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}

MicroBatches = tuple[tuple[tuple[int, ...], int], ...]
# (tokens of each sample, padded length) of the four micro-batches of a step.
EQUAL: MicroBatches = (((16, 11), 16), ((9, 16), 16), ((12, 13), 16), ((16, 2), 16))
MIXED: MicroBatches = (((16, 11), 16), ((9, 16), 16), ((7, 8), 8), ((3, 8), 8))


@dataclass(frozen=True)
class Model:
    """What one process and many compute alike.

    ``moe_layers`` has a digit for each layer, 1 for an MoE layer; ``hybrid`` is the pattern of a
    ``HybridModel`` instead, where attention and MoE are layers of their own.
    """

    moe_layers: str = "01101111"
    mtp_layers: int = 0
    hybrid: str = ""

    @property
    def moe_layer_numbers(self) -> list[int]:
        """Megatron's numbers, from 1, of the layers that have a router."""
        layers = self.hybrid.replace("|", "") or self.moe_layers
        return [number for number, kind in enumerate(layers, 1) if kind in "1E"]

    @property
    def config(self) -> dict[str, Any]:
        if self.hybrid:
            return {"num_layers": len(self.hybrid.replace("|", "")), "is_hybrid_model": True}
        settings: dict[str, Any] = {
            "num_layers": len(self.moe_layers),
            "moe_layer_freq": [int(kind) for kind in self.moe_layers],
        }
        return settings | ({"mtp_num_layers": self.mtp_layers} if self.mtp_layers else {})


@dataclass(frozen=True)
class Layout:
    """A row of the table: the groups of Megatron's ranks, and how the model runs on them."""

    groups: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=lambda: FULL)
    model: Model = Model()
    micro_batches: MicroBatches = EQUAL
    world_size: int = 2
    packed: bool = False
    """Whether the samples, each with its padding, stand in one row behind each other (THD)."""
    accept: frozenset[str] = frozenset()
    expert_gradients: bool = True
    """Whether Megatron reduces them right: with ETP other than TP but no EP it averages the shards
    of different ranks (seen on 0.16.1)."""


EVERY_SECOND = Model("10101010")
DENSE_FIRST = Model("01111111")
FIRST_HALF_DENSE = Model("00000101")
LAST_HALF_DENSE = Model("01100000")
MTP = Model("0110", mtp_layers=1)
# As many routers (3 of the decoder, 1 of MTP) as layers: counting alone cannot tell them apart.
MTP_COUNTS_COINCIDE = Model("0111", mtp_layers=1)
HYBRID = Model(hybrid="*E*E*E")

LAYOUTS: dict[str, Layout] = {
    # one kind of parallelism
    "tp2_sp allgather": Layout({TP: 2}),
    "tp2_sp alltoall": Layout({TP: 2}, FULL | ALLTOALL),
    "cp2": Layout({CP: 2}),
    "pp2": Layout({PP: 2}),
    "pp2_vpp2": Layout({PP: 2, VPP: 2}),
    "dp2": Layout(),
    "ep2 allgather": Layout({EP: 2}),
    "ep2 alltoall": Layout({EP: 2}, FULL | ALLTOALL),
    "etp2 allgather": Layout({ETP: 2}, expert_gradients=False),
    "etp2 alltoall": Layout({ETP: 2}, FULL | ALLTOALL, expert_gradients=False),
    # two kinds
    "tp2_etp1_ep2": Layout({TP: 2, ETP: 1, EP: 2}, FULL | ALLTOALL),
    "tp2_pp2": Layout({TP: 2, PP: 2}, world_size=4),
    "pp2_ep2": Layout({PP: 2, EP: 2}, FULL | ALLTOALL, world_size=4),
    "ep2_etp2": Layout({EP: 2, ETP: 2}, world_size=4),
    "cp2_tp2": Layout({CP: 2, TP: 2}, world_size=4),
    # recompute
    "pp2_vpp2 none": Layout({PP: 2, VPP: 2}, {}),
    "pp2_vpp2 block": Layout({PP: 2, VPP: 2}, BLOCK),
    "pp2_vpp2 selective": Layout({PP: 2, VPP: 2}, SELECTIVE),
    "tp2_sp selective": Layout({TP: 2}, SELECTIVE),
    # packed batches
    "tp2_sp packed": Layout({TP: 2}, packed=True),
    "cp2 packed": Layout({CP: 2}, packed=True),
    "cp2_tp2 packed": Layout({CP: 2, TP: 2}, world_size=4, packed=True),
    "pp2_vpp2 packed": Layout({PP: 2, VPP: 2}, packed=True),
    # micro-batches of different sizes
    "pp2 mixed sizes": Layout(
        {PP: 2}, BLOCK | ALLTOALL | {"variable_seq_lengths": True}, micro_batches=MIXED
    ),
    "ep2 mixed sizes": Layout({EP: 2}, SELECTIVE | ALLTOALL, micro_batches=MIXED),
    # where the MoE layers are
    "pp2 dense first": Layout({PP: 2}, model=DENSE_FIRST),
    "pp2 every second": Layout({PP: 2}, model=EVERY_SECOND),
    "pp2 no MoE on the first stage": Layout({PP: 2}, model=FIRST_HALF_DENSE),
    "pp2 no MoE on the last stage": Layout({PP: 2}, model=LAST_HALF_DENSE),
    # uneven pipelines
    "pp2 short first stage": Layout({PP: 2}, FULL | {"num_layers_in_first_pipeline_stage": 3}),
    "pp2_vpp2 custom layout": Layout(
        {PP: 2, VPP: 2}, FULL | {"pipeline_model_parallel_layout": "Et|tt|ttt|ttL"}
    ),
    # multi-token prediction
    "pp2 mtp": Layout({PP: 2}, model=MTP),
    "tp2 mtp, counts coincide": Layout({TP: 2}, model=MTP_COUNTS_COINCIDE),
    "dp2 mtp, counts coincide": Layout(model=MTP_COUNTS_COINCIDE),
    # attention and MoE as layers of their own
    "tp2_sp hybrid": Layout({TP: 2}, {}, model=HYBRID),
    "pp2 hybrid": Layout({PP: 2}, {}, model=Model(hybrid="*E*|E*E")),
    # bf16 in Megatron's Float16Module
    "pp2_vpp2 bf16": Layout({PP: 2, VPP: 2}, FULL | BF16),
    # the forward of one micro-batch overlaps the backward of another
    "ep2 overlap": Layout({EP: 2}, ALLTOALL | BF16 | OVERLAP, accept=OVERLAP_ACCEPTED),
    "pp2_vpp2_ep2 overlap": Layout(
        {PP: 2, VPP: 2, EP: 2},
        ALLTOALL | BF16 | OVERLAP,
        world_size=4,
        accept=OVERLAP_ACCEPTED,
    ),
}
