"""The steps, one after the other: rollout, passes, figures, page."""

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks._measure import surroundings
from examples.demo import DemoError
from examples.demo.metrics import differing_decisions
from examples.demo.picture import draw
from examples.demo.rollout import Sample, load, roll_out, save
from examples.demo.server import serve
from examples.demo.small_model import held_out_prompts
from examples.demo.steps import progress_bar, small_model
from examples.demo.trainer import Scores
from examples.evidence.document import write_document
from examples.evidence.passes import differences, score_everywhere
from examples.evidence.prompts import library_prompts
from examples.evidence.routing import measure_routing
from megatron_r3.hf_loader import read_hf_config
from shared_schema import RoutingLayout
from shared_schema.cli.plots import draw_load

TRAIN_STEPS = 750
"""As in the demo, so that both share a checkpoint."""

console = Console()


def run(options: argparse.Namespace, server_environment: Mapping[str, str]) -> None:
    """Measure, and write traces, figures and `evidence.md` to `options.out`.

    Raises:
        DemoError: a step could not be done.

    """
    out: Path = options.out
    traces = out / "traces"
    traces.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, prompts = _model_and_prompts(options)
    layout = RoutingLayout.from_hf_config(read_hf_config(model))
    samples = _rollout(model, prompts, layout, traces, options, server_environment)
    with console.status("entropy, locality, sizes"):
        routing = measure_routing([sample.routed for sample in samples])
        draw_load(out / "evidence_load.png", routing.statistics)
    found = None
    if not options.rollout_only:
        with console.status("float32, and Megatron without and with replay"):
            passes = score_everywhere(model, samples, layout)
        found = differences(passes, samples)
        _draw(out / "evidence_replay.png", passes, samples, layout)
    machine = surroundings("moe-r3", "vllm", "megatron-core", "torch", "transformers", "zstandard")
    figures = {"routing": routing.to_dict(), **machine}
    if found is not None:
        figures["differences"] = {
            title: {**asdict(difference), "ratios_beyond": beyond}
            for title, (difference, beyond) in found.items()
        }
    (out / "evidence.json").write_text(json.dumps(figures, indent=2) + "\n")
    (out / "evidence.md").write_text(
        write_document(
            _about(model, samples, small=options.model is None),
            options.model is None,
            routing,
            found,
            machine,
        )
    )
    console.print(f"{out}/evidence.md, evidence.json and the pictures hold the figures.")


def _model_and_prompts(options: argparse.Namespace) -> tuple[Path, list[list[int]]]:
    if options.model is None:
        options.cache.mkdir(parents=True, exist_ok=True)
        return small_model(options.cache, TRAIN_STEPS), held_out_prompts(options.prompts)
    if not (options.model / "config.json").is_file():
        raise DemoError(
            f"{options.model} has no config.json, expected a checkpoint folder: download it first, "
            "for example with `hf download NAME --local-dir FOLDER`."
        )
    return options.model, library_prompts(options.model, options.prompts)


def _rollout(
    model: Path,
    prompts: list[list[int]],
    layout: RoutingLayout,
    traces: Path,
    options: argparse.Namespace,
    environment: Mapping[str, str],
) -> list[Sample]:
    log = traces / "server.log"
    with ExitStack() as running:
        with console.status("vllm serve --enable-return-routed-experts"):
            url = running.enter_context(serve(model, log, environment, options.serve_options))
        with progress_bar() as progress:
            task = progress.add_task("sampling", total=len(prompts))
            samples = roll_out(
                url, prompts, options.max_tokens, layout, lambda: progress.advance(task)
            )
    if not any(sample.routed.recorded.any() for sample in samples):
        raise DemoError("vLLM returned no routed experts; is the package installed beside it?")
    save(samples, traces)
    return load(traces, layout)


def _draw(
    path: Path, passes: dict[str, Scores], samples: list[Sample], layout: RoutingLayout
) -> None:
    recorded = np.concatenate([s.routed.recorded for s in samples])
    pairs = {
        "native": ("native", "rollout"),
        "replayed": ("replayed", "rollout"),
        "self": ("native again", "native"),
    }
    draw(
        path,
        {name: passes[a].logprobs - passes[b].logprobs for name, (a, b) in pairs.items()},
        {
            name: differing_decisions(passes[a].ids[recorded], passes[b].ids[recorded])
            for name, (a, b) in pairs.items()
        },
        np.asarray(layout.moe_layers),
    )


def _about(model: Path, samples: list[Sample], small: bool) -> str:
    sampled = sum(len(sample.output_ids) for sample in samples)
    missing = sum(int((~sample.routed.recorded).sum()) for sample in samples)
    name = "the small model of the demo" if small else f"`{model.name}`"
    return (
        f"Model: {name}. {len(samples)} prompts out of Python's standard library, {sampled:,} "
        f"tokens sampled at temperature 1 by vLLM in bf16, {missing} rows of routed experts "
        "missing.\n"
    )
