"""Command line: `python -m examples.ray_pair`."""

import argparse
import os
import tempfile
import warnings
from pathlib import Path

from examples import ray_pair

OBJECT_STORE_BYTES = 256 << 20  # the default is a third of the machine's memory


def main() -> None:
    options = _options()
    # megatron-core tells at every import that it found no Transformer Engine and no Apex.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from rich.console import Console
    from rich.progress import track

    from examples.ray_pair.pair import make_actors, report, step

    console = Console()
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            with console.status("model, engine and trainers start"):
                actors = make_actors(options.model, options.trainers, Path(folder) / "store")
            for number in track(range(options.steps), "steps", console=console):
                reports = step(actors, number, options.prompts, options.max_tokens)
                console.print(report(number, reports))
    finally:
        ray.shutdown()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ray_pair",
        description=ray_pair.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo = Path("build/demo/model")
    checkpoint = max(demo.glob("*/config.json"), default=demo / "none/config.json")
    parser.add_argument("--model", type=Path, default=checkpoint.parent, help="checkpoint folder")
    parser.add_argument("--trainers", type=int, default=2, help="data-parallel trainers (2)")
    parser.add_argument("--steps", type=int, default=2, help="rollouts and training steps (2)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts in a step (16)")
    parser.add_argument("--max-tokens", type=int, default=48, help="to sample for each (48)")
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        parser.error(f"{options.model} holds no model: run `make demo` first, or pass --model.")
    if options.prompts < options.trainers:
        parser.error(f"--prompts {options.prompts} is too few for {options.trainers} trainers.")
    return options


if __name__ == "__main__":
    main()
