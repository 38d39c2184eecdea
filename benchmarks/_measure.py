"""What the benchmarks share: versions, hardware, intervals, the closing JSON line."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


def surroundings(*packages: str) -> dict[str, Any]:
    """Versions of `packages` (those installed) and the hardware, for the closing JSON line."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    hardware = {"cpu": _cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    return {"versions": versions, "hardware": hardware}


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.asarray(values), (4000, len(values))), axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def finish(result: dict[str, Any]) -> None:
    """Print the result as the last line."""
    print(json.dumps(result), flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
