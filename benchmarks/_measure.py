"""What the benchmarks share: versions, hardware, intervals, the closing JSON line."""

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


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


def median_interval(values: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.asarray(values), (4000, np.size(values))), axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def interleaved(
    arms: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Call every arm once a round, in a random order, so that none has always the same before it.

    Returns:
        for each arm what it returned in the rounds after ``warm_up``, ``[rounds, ...]``.

    """
    from rich.progress import track

    names = list(arms)
    returned: dict[str, list[Any]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    for number in track(range(warm_up + rounds), "rounds"):
        for name in order.permutation(names).tolist():
            result = arms[name]()
            if number >= warm_up:
                returned[name].append(result)
    return {name: np.asarray(values) for name, values in returned.items()}


def paired_ratio(ours: Any, theirs: Any) -> tuple[float, tuple[float, float]]:
    """Median of the ratios of paired rounds ``[rounds]``, and its interval."""
    ratios = np.asarray(ours) / np.asarray(theirs)
    return float(np.median(ratios)), median_interval(ratios)


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
