"""Command line: `python -m examples.evidence`."""

import argparse
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

from examples import evidence
from examples.demo import DemoError
from shared_schema import RoutingSchemaError


def main() -> int:
    """Measure, and write the document."""
    options = _options()
    # Ended from outside, too, it unwinds, and so takes the server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = dict(os.environ)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU is for the server alone
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    try:
        from examples.evidence import steps  # takes seconds, which --help need not

        steps.run(options, environment)
    except (DemoError, RoutingSchemaError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.evidence",
        description=evidence.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder; without it, the small model of the demo"
    )
    parser.add_argument(
        "--rollout-only",
        action="store_true",
        help="measure the rollout's routing alone; scoring in float32 and Megatron needs a "
        "Qwen3-MoE that fits into this machine's memory in float32",
    )
    parser.add_argument(
        "--serve-options",
        type=shlex.split,
        default="",
        metavar='"--tensor-parallel-size 8"',
        help="further options of vllm serve, in quotes",
    )
    parser.add_argument("--prompts", type=_positive, default=64, help="sequences to sample")
    parser.add_argument(
        "--max-tokens", type=_positive, default=160, help="tokens to sample for each"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/evidence"), help="folder of evidence.md and traces"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("build/demo/model"), help="where the small model is kept"
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 2 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
