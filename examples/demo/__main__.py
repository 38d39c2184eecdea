"""Command line: `python -m examples.demo`."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from examples import demo
from shared_schema import RoutingSchemaError


def main() -> int:
    """Run the demo; 0 when replay helped and every row arrived."""
    options = _options()
    # Ended from outside, too, the demo unwinds, and so takes the server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    environment = dict(os.environ)
    # Model and trainer are small and run on the CPU; a GPU is for the server alone.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # megatron-core tells at every import that it found no Transformer Engine and no Apex.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

    try:
        from examples.demo import steps  # takes seconds, which --help need not

        return steps.run(
            options.out, options.prompts, options.max_tokens, options.train_steps, environment
        )
    except (demo.DemoError, RoutingSchemaError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=demo.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of results")
    parser.add_argument("--prompts", type=_between(2, 512), default=48, help="sequences to sample")
    parser.add_argument(
        "--max-tokens", type=_between(2, 512), default=128, help="most tokens to sample for each"
    )
    parser.add_argument(
        "--train-steps",
        type=_between(1, 100_000),
        default=750,
        help="steps that the small model is trained for, the first time",
    )
    return parser.parse_args()


def _between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {low} to {high}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
