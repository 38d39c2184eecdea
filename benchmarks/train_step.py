"""A whole training step of a MoE model with and without replay, with full recompute.

Megatron's own schedule runs packed micro-batches forward and backward, then its optimizer steps.
One model takes all steps: routes are recorded once, and the learning rate is 0, so that native and
replayed steps use the same experts and differ in nothing but replay. The replayed step includes
`feed`, the checks of the routes, and the agreement that is sampled by default. The native steps run
on the stock routers, detached; two of them in each round show the noise (A/A).
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

import megatron_r3
from benchmarks._measure import finish, interleaved, paired_ratio, surroundings
from benchmarks._megatron import device_name, seconds, start
from megatron_r3.reference_attention import with_reference_attention
from shared_schema import RoutedExpertsBatch

VOCABULARY = 2048


class Trainer:
    """One model with its optimizer, and the micro-batches of a step."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        fused = device.type == "cuda"
        config = TransformerConfig(
            num_layers=args.layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.hidden_size // 64,
            ffn_hidden_size=args.hidden_size,
            moe_ffn_hidden_size=args.hidden_size // 2,
            num_moe_experts=args.experts,
            moe_router_topk=args.top_k,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            moe_grouped_gemm=fused,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            normalization="RMSNorm",
            bias_dropout_fusion=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            use_cpu_initialization=not fused,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        )
        # On a GPU what people train with: Transformer Engine's attention and grouped experts.
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=fused, normalization="RMSNorm"
        )
        self.inner = GPTModel(
            config,
            spec if fused else with_reference_attention(spec),
            vocab_size=VOCABULARY,
            max_sequence_length=args.tokens,
            position_embedding_type="rope",
        ).to(device, torch.bfloat16)
        self.model = DistributedDataParallel(
            config, DistributedDataParallelConfig(), Float16Module(config, self.inner)
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=0.0, bf16=True, params_dtype=torch.bfloat16),
            [self.model],
        )
        generator = torch.Generator().manual_seed(0)
        self.lengths = [args.tokens // args.samples] * args.samples
        shape = (args.micro_batches, 1, sum(self.lengths))
        self.tokens = torch.randint(0, VOCABULARY, shape, generator=generator).to(device)
        positions = torch.cat([torch.arange(length) for length in self.lengths])[None]
        self.positions = positions.to(device)
        bounds = torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32, device=device)
        self.packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(self.lengths),
            max_seqlen_kv=max(self.lengths),
        )
        self.controller: megatron_r3.Controller | None = None
        self.routes = self._recorded()

    def step(self, routes: Sequence[RoutedExpertsBatch | None] = ()) -> None:
        """One training step; with a controller attached, ``routes`` of each micro-batch."""

        def forward_step(numbers: Iterator[int], chunk: torch.nn.Module) -> Any:
            number = next(numbers)
            if self.controller is not None:
                self.controller.feed(
                    chunk,
                    routes[number],
                    packed_seq_params=self.packing,
                    host_lengths=self.lengths,
                )
            tokens = self.tokens[number]
            losses = chunk(
                tokens,
                self.positions,
                None,
                labels=tokens.roll(-1, 1),
                packed_seq_params=self.packing,
            )
            return losses, lambda output: (output.float().mean(), {})

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(len(self.tokens))),
            model=self.model,
            num_microbatches=len(self.tokens),
            seq_length=sum(self.lengths),
            micro_batch_size=1,
            forward_only=False,
        )
        self.model.finish_grad_sync()
        self.optimizer.step()

    def native_step(self) -> float:
        """Seconds of a step of the stock routers."""
        return seconds(self.step, self.device)

    def replayed_step(self) -> float:
        """Seconds of a step under replay; attaching is once for a training and not timed."""
        self.controller = megatron_r3.attach(self.model)

        schedules: list[megatron_r3.Schedule] = []

        def step() -> None:
            assert self.controller is not None
            with self.controller.schedule("replay") as schedule:
                self.step(self.routes)
            schedules.append(schedule)

        taken = seconds(step, self.device)
        agreement = schedules[0].metrics().total.agreement
        assert agreement is not None
        assert agreement > 0.99, f"native steps use other experts, agreement {agreement}"
        self.controller.detach()
        self.controller = None
        return taken

    def _recorded(self) -> list[RoutedExpertsBatch]:
        """The routers' own routes, without the last row of each sample, as a rollout's are."""
        self.controller = megatron_r3.attach(self.model)
        with self.controller.schedule("record") as schedule:
            self.step([None] * len(self.tokens))
        self.controller.detach()
        self.controller = None
        recorded = schedule.gather()
        return [
            RoutedExpertsBatch.from_list([sample[:-1] for sample in micro_batch])
            for micro_batch in recorded.chunk(len(self.tokens))
        ]


def measure(trainer: Trainer, rounds: int, warm_up: int) -> dict[str, Any]:
    """Compare steps with replay, without, and without again."""
    times = interleaved(
        {
            "replay": trainer.replayed_step,
            "native": trainer.native_step,
            "native again": trainer.native_step,
        },
        rounds,
        warm_up,
    )
    ratio, interval = paired_ratio(times["replay"], times["native"])
    aa_ratio, aa_interval = paired_ratio(times["native again"], times["native"])
    return {
        "step_ratio": ratio,
        "interval": interval,
        "aa_ratio": aa_ratio,
        "aa_interval": aa_interval,
        "native_step_s": float(np.median(times["native"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="A whole training step with and without replay, with full recompute.",
        epilog="Sizes: the first default is a CPU's, the second a GPU's.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    sizes = {
        "layers": (4, 16),
        "hidden-size": (128, 2048),
        "experts": (16, 128),
        "top-k": (4, 8),
        "micro-batches": (4, 8),
        "tokens": (256, 16384),
        "samples": (4, 8),
    }
    for name, (small, large) in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {small} or {large}")
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    args = parser.parse_args()
    device = start(args.device)
    for name, defaults in sizes.items():
        field = name.replace("-", "_")
        if getattr(args, field) is None:
            setattr(args, field, defaults[device.type == "cuda"])
    result = measure(Trainer(args, device), args.rounds, args.warm_up)
    finish(
        {
            **result,
            **{k: v for k, v in vars(args).items() if k != "device"},
            "device": device_name(device),
            **surroundings("moe-r3", "megatron-core", "transformer-engine", "torch", "numpy"),
        }
    )


if __name__ == "__main__":
    main()
