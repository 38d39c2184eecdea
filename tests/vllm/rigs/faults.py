"""Makes chosen calls of any function of the plugin raise, before or after it has done its work."""

import importlib
import inspect
import itertools
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import vllm_r3_plugin
from vllm_r3_plugin import step_capture
from vllm_r3_plugin.step_rows import StepRows


class InjectedError(RuntimeError):
    """What a call that is made to fail raises."""


@dataclass(frozen=True)
class FaultPoint:
    """A function or method of the plugin, wherever it is reached from."""

    name: str
    owners: tuple[Any, ...]
    attribute: str
    function: Callable[..., Any]


def fault_points(modules: Collection[str]) -> list[FaultPoint]:
    """Every function and method that these modules of the plugin define."""
    loaded = [importlib.import_module(f"vllm_r3_plugin.{name}") for name in modules]
    points = []
    for module in loaded:
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                users = [m for m in _plugin_modules() if vars(m).get(name) is value]
                points.append(FaultPoint(name, tuple(users), name, value))
            elif inspect.isclass(value):
                points += [
                    FaultPoint(f"{name}.{attribute}", (value,), attribute, function)
                    for attribute, function in vars(value).items()
                    if inspect.isfunction(function)
                    and function.__code__.co_filename == module.__file__
                ]
    return points


@contextmanager
def failing(
    point: FaultPoint, calls: Collection[int], *, after: bool, error: type[Exception]
) -> Iterator[list[int]]:
    """Calls number `calls`, from 1, raise; yields the numbers of those that did."""
    made: list[int] = []
    count = 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        now = count in calls
        if now and not after:
            made.append(count)
            raise error(f"injected before {point.name}")
        result = point.function(*args, **kwargs)
        if now:
            made.append(count)
            raise error(f"injected after {point.name}")
        return result

    for owner in point.owners:
        setattr(owner, point.attribute, fails)
    try:
        yield made
    finally:
        for owner in point.owners:
            setattr(owner, point.attribute, point.function)


def _plugin_modules() -> list[Any]:
    names = [module.name for module in pkgutil.iter_modules(vllm_r3_plugin.__path__)]
    return [
        sys.modules[name]
        for name in (f"vllm_r3_plugin.{name}" for name in names)
        if name in sys.modules
    ]


MISFITS: dict[str, Callable[[StepRows], StepRows]] = {
    "fewer rows": lambda r: r._replace(positions=r.positions[:-1], ids=r.ids[:-1]),
    "fewer ids": lambda r: r._replace(ids=r.ids[:-1]),
    "a request less": lambda r: r._replace(request_ids=r.request_ids[:-1]),
    "another number of layers": lambda r: r._replace(ids=r.ids[:, :1]),
    "another top-k": lambda r: r._replace(ids=r.ids[..., :1]),
    "a wider dtype": lambda r: r._replace(ids=r.ids.astype(np.uint16) + 256),
    "floats": lambda r: r._replace(ids=r.ids.astype(np.float32)),
    "positions below 0": lambda r: r._replace(positions=r.positions - 300),
    "positions beyond the longest": lambda r: r._replace(positions=r.positions + 300),
    "lengths that do not sum up": lambda r: r._replace(num_tokens=r.num_tokens + 1),
    "unknown requests": lambda r: r._replace(request_ids=[f"?{name}" for name in r.request_ids]),
    "ids that are no experts": lambda r: r._replace(ids=r.ids + np.uint8(200)),
    "nothing": lambda r: r._replace(ids=None),  # type: ignore[arg-type]
}
"""What a worker may send in place of a step's rows."""


@contextmanager
def misfitting(alter: Callable[[StepRows], StepRows]) -> Iterator[list[int]]:
    """Every seventh step's rows are altered on their way; yields the numbers of these steps."""
    made: list[int] = []
    attach, steps = step_capture.attach_rows, itertools.count(1)

    def attach_altered(output: Any, rows: StepRows) -> None:
        number = next(steps)
        if number % 7 == 0:
            made.append(number)
            rows = alter(rows)
        attach(output, rows)

    step_capture.attach_rows = attach_altered
    try:
        yield made
    finally:
        step_capture.attach_rows = attach
