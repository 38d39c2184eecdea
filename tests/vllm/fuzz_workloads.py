"""Draws workloads and runs them on a live engine; the tests run a slice of this.

python -m tests.vllm.fuzz_workloads --examples 200
"""

import argparse
import secrets
import tempfile
from pathlib import Path

from .rigs import engine_process, tiny_models
from .rigs.live_engine import ENGINES, run_workloads
from .rigs.transformers_oracle import TransformersOracle


def main() -> None:
    """Run on both engines, print what was seen, and compare with transformers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--engine", choices=list(ENGINES), action="append")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    options = parser.parse_args()
    engine_process.TIMEOUT_S = 600 + 20 * options.examples
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.make_moe(Path(folder, "model"))
        updated = tiny_models.make_other_routers(Path(folder, "updated"), model)
        oracle = TransformersOracle(model)
        print("seed", options.seed, flush=True)
        for name in options.engine or ENGINES:
            tally = engine_process.run_in_engine_process(
                run_workloads, model, updated, name, options.examples, options.seed
            )
            print(name, dict(tally.counts), oracle.agreement(tally.for_oracle), flush=True)


if __name__ == "__main__":
    main()
