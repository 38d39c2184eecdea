"""Command line: `python -m examples.megatron_loop`."""

import argparse
import os
import warnings
from pathlib import Path

from examples import megatron_loop


def main() -> None:
    options = _options()
    # torch and megatron-core tell at every import what they do without.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

    from examples.megatron_loop import loop  # takes seconds, which --help need not

    loop.start_megatron(
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        tensor_model_parallel_size=options.tensor_parallel,
        pipeline_model_parallel_size=options.pipeline_parallel,
        expert_model_parallel_size=options.expert_parallel,
    )
    loop.train(options.model, options.rollout, options.steps, options.samples)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.megatron_loop",
        description=megatron_loop.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo = Path("build/demo")
    checkpoint = max(demo.glob("model/*/config.json"), default=demo / "model/none/config.json")
    parser.add_argument("--model", type=Path, default=checkpoint.parent, help="checkpoint folder")
    parser.add_argument("--rollout", type=Path, default=demo / "rollout", help="folder of samples")
    parser.add_argument("--steps", type=int, default=4, help="training steps (4)")
    parser.add_argument("--samples", type=int, default=16, help="samples in a step (16)")
    for kind in ("tensor", "pipeline", "expert"):
        parser.add_argument(f"--{kind}-parallel", type=int, default=1, help="ranks (1)")
    options = parser.parse_args()
    for path in (options.model / "config.json", options.rollout / "samples.json"):
        if not path.exists():
            parser.error(f"{path} is missing: run `make demo` first, or pass another folder.")
    return options


if __name__ == "__main__":
    main()
