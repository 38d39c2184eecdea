"""The demo's steps, one after the other, announced with their progress."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import megatron_r3
from examples.demo import DemoError
from examples.demo.metrics import compare, differing_decisions
from examples.demo.picture import draw
from examples.demo.policy_step import policy_gradient_step
from examples.demo.report import Report
from examples.demo.rollout import Sample, load, roll_out, save
from examples.demo.server import serve
from examples.demo.small_model import checkpoint_folder, held_out_prompts, train_checkpoint
from examples.demo.trainer import RouterWatch, Scores, build_trainer, score, start_megatron
from megatron_r3.hf_loader import read_hf_config
from shared_schema import RoutingLayout

SAMPLES_PER_BATCH = 8
SAMPLES_PER_OTHER_BATCH = 5

console = Console()


def run(
    out: Path,
    prompts: int,
    max_tokens: int,
    train_steps: int,
    server_environment: Mapping[str, str],
) -> int:
    """Run everything, print and write the report, and return the exit status.

    Raises:
        DemoError: a step could not be done.

    """
    try:
        for folder in ("model", "rollout"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"{out} cannot hold the results ({error}); pass another --out.") from None
    # A second thread gains a tenth on matrices this small, and loses threefold on shared cores.
    torch.set_num_threads(1)
    _announce("1/4", "A small Qwen3-MoE, trained on Python's standard library")
    model = small_model(out / "model", train_steps)
    layout = RoutingLayout.from_hf_config(read_hf_config(model))
    _announce("2/4", "Rollout: vllm serve --enable-return-routed-experts")
    with ExitStack() as running:
        with console.status("starting the server"):
            url = running.enter_context(
                serve(model, out / "rollout" / "server.log", server_environment)
            )
        samples = _sample(url, layout, prompts, max_tokens)
    save(samples, out / "rollout")
    samples = load(out / "rollout", layout)
    _announce("3/4", "Trainer: megatron-core scores the samples, then takes a policy step")
    report = _train(model, layout, samples, out)
    _announce("4/4", "Report")
    report.write(out)
    console.print(report.table())
    console.print(f"{out}/report.md, report.json and report.png hold the rest.")
    console.print(report.verdict(), style="bold red" if report.exit_status else "bold green")
    return report.exit_status


def small_model(cache: Path, train_steps: int) -> Path:
    model = checkpoint_folder(cache, train_steps)
    if not model.exists():
        with progress_bar(TextColumn("loss {task.fields[loss]:.2f} nats a byte")) as progress:
            task = progress.add_task("training, once", total=train_steps, loss=np.nan)
            train_checkpoint(
                model,
                train_steps,
                lambda step, loss: progress.update(task, completed=step, loss=loss),
            )
    console.print(f"checkpoint: {model}")
    return model


def _sample(url: str, layout: RoutingLayout, prompts: int, max_tokens: int) -> list[Sample]:
    with progress_bar() as progress:
        task = progress.add_task("sampling", total=prompts)
        return roll_out(
            url, held_out_prompts(prompts), max_tokens, layout, lambda: progress.advance(task)
        )


def _train(model: Path, layout: RoutingLayout, samples: list[Sample], out: Path) -> Report:
    start_megatron()
    gpt = build_trainer(model)
    controller = megatron_r3.attach(gpt, layout=layout)
    watch = RouterWatch(gpt)
    batches = _batched(range(len(samples)), SAMPLES_PER_BATCH)
    shuffled = np.random.default_rng(0).permutation(len(samples)).tolist()
    other_batches = _batched(shuffled, SAMPLES_PER_OTHER_BATCH)
    with console.status("log-probs with native routing"):
        native = score(gpt, controller, watch, samples, batches, "native")
    with console.status("log-probs with the rollout's experts"):
        replayed = score(gpt, controller, watch, samples, batches, "replay")
    with console.status("log-probs with native routing, in other batches"):
        again = score(gpt, controller, watch, samples, other_batches, "native")
    with console.status("policy-gradient step under replay, with full recompute"):
        step = policy_gradient_step(gpt, controller, watch, samples)
    console.print(
        f"policy step: loss {step.loss:+.1e}, gradient norm {step.grad_norm:.3f}; "
        f"{step.forwards} router calls and their {step.recomputes} recomputes used the rollout's "
        "experts, and every gate got a gradient"
    )
    return _report(layout, samples, {"native": native, "replayed": replayed, "self": again}, out)


def _report(
    layout: RoutingLayout, samples: list[Sample], passes: dict[str, Scores], out: Path
) -> Report:
    """Compare the passes over the rows that were recorded, and draw the picture."""
    recorded = np.concatenate([s.routed.recorded for s in samples])
    if not recorded.any():
        raise DemoError("vLLM returned no routed experts; is the package installed beside it?")
    rollout = Scores(
        np.concatenate([s.logprobs for s in samples]),
        np.concatenate([s.routed.ids for s in samples]),
    )
    pairs = {name: (scores, rollout) for name, scores in passes.items()}
    pairs["self"] = (passes["self"], passes["native"])
    differences = {
        name: compare(one.logprobs, other.logprobs, one.ids[recorded], other.ids[recorded])
        for name, (one, other) in pairs.items()
    }
    draw(
        out / "report.png",
        {name: one.logprobs - other.logprobs for name, (one, other) in pairs.items()},
        {
            name: differing_decisions(one.ids[recorded], other.ids[recorded])
            for name, (one, other) in pairs.items()
        },
        np.asarray(layout.moe_layers),
    )
    return Report(
        native=differences["native"],
        replayed=differences["replayed"],
        self_noise=differences["self"],
        tokens=len(rollout.logprobs),
        rows_missing=int((~recorded).sum()),
    )


def _batched(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _announce(number: str, title: str) -> None:
    console.print(f"[bold cyan]{number}[/]  [bold]{title}[/]", highlight=False)


def progress_bar(*more: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *more,
        console=console,
    )
