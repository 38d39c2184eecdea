"""The report: table, JSON, Markdown, and the verdict that decides the exit status."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.demo.metrics import Difference

PACKAGES = ("moe-r3", "vllm", "megatron-core", "torch", "transformers")
COLUMNS = {"native": "native", "replayed": "R3 replay", "self": "self"}
ROWS = {
    "router_mismatch": ("router decisions that differ", "{:.2%}"),
    "token_mismatch": ("tokens with such a decision", "{:.2%}"),
    "logprob_abs_mean": ("log-prob difference, mean (nats)", "{:.5f}"),
    "logprob_abs_max": ("log-prob difference, largest", "{:.4f}"),
    "kl_k1": ("KL, k1", "{:+.2e}"),
    "kl_k3": ("KL, k3", "{:.2e}"),
    "extreme_ratio_share": ("ratios above 2 or below 1/2", "{:.3%}"),
}
CAPTION = (
    "native and R3 replay: the trainer against the rollout; self: the trainer's native routing "
    "against itself in other batches, its noise floor"
)


@dataclass(frozen=True)
class Report:
    """What the demo measured.

    `native` and `replayed` compare the trainer with the rollout, `self_noise` the trainer's
    native pass with another one over other batches. `tokens` counts the sampled tokens,
    `rows_missing` the rows of routed experts that did not arrive.
    """

    native: Difference
    replayed: Difference
    self_noise: Difference
    tokens: int
    rows_missing: int

    @property
    def differences(self) -> dict[str, Difference]:
        """The three comparisons by their names in `report.json`."""
        return {"native": self.native, "replayed": self.replayed, "self": self.self_noise}

    def failures(self) -> list[str]:
        """Say what keeps this run from being a success; empty when replay did its work."""
        found = []
        if self.rows_missing:
            found.append(f"{self.rows_missing} rows of routed experts did not arrive")
        if self.replayed.router_mismatch:
            found.append(
                f"under replay {self.replayed.router_mismatch:.2%} of the router decisions still "
                "differ from the rollout's"
            )
        for key in ("kl_k3", "logprob_abs_mean"):
            native, replayed = getattr(self.native, key), getattr(self.replayed, key)
            if not replayed < native:
                found.append(f"replay did not lower {key} ({native:.2e} to {replayed:.2e})")
        return found

    @property
    def exit_status(self) -> int:
        """0 for a success, 1 otherwise."""
        return 1 if self.failures() else 0

    def verdict(self) -> str:
        """Say in one sentence what replay changed, or what went wrong."""
        if failures := self.failures():
            return f"This run failed: {'; '.join(failures)}."
        return (
            f"Left to itself, the trainer chose other experts than the rollout for "
            f"{self.native.token_mismatch:.1%} of the tokens; replaying the rollout's choice "
            f"brought that to {self.replayed.token_mismatch:.0%} and made the KL divergence "
            f"between the two {self.native.kl_k3 / self.replayed.kl_k3:.1f} times smaller."
        )

    def table(self) -> Table:
        """Lay the numbers out for the terminal."""
        table = Table(title=f"{self.tokens:,} sampled tokens", caption=CAPTION)
        table.add_column(no_wrap=True)
        for title in COLUMNS.values():
            table.add_column(title, justify="right")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md`."""
        content: dict[str, Any] = {
            name: asdict(difference) for name, difference in self.differences.items()
        }
        content |= {
            "tokens": self.tokens,
            "rows_missing": self.rows_missing,
            "versions": {package: version(package) for package in PACKAGES},
        }
        (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n")
        header = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
        lines = ["| " + " | ".join(cells) + " |" for cells in self._cells()]
        versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
        (folder / "report.md").write_text(
            "\n".join(
                [
                    "# Rollout in vLLM, replay in Megatron",
                    "",
                    self.verdict(),
                    "",
                    *header,
                    *lines,
                    "",
                    f"{CAPTION[0].upper()}{CAPTION[1:]}.",
                    "",
                    "![Log-prob differences and agreement of each layer](report.png)",
                    "",
                    f"{self.tokens} sampled tokens; {self.rows_missing} rows missing; {versions}.",
                    "",
                ]
            )
        )

    def _cells(self) -> list[list[str]]:
        return [
            [label, *(form.format(getattr(d, key)) for d in self.differences.values())]
            for key, (label, form) in ROWS.items()
        ]
