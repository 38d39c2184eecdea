"""Takes over ``--enable-return-routed-experts``: wraps ``EngineArgs.create_engine_config``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from vllm_r3_plugin import engine_core, fetch_endpoint, front_end, metrics, releases, seam_check
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.options import R3Options
from vllm_r3_plugin.scheduler_factory import SchedulerFactory
from vllm_r3_plugin.worker import worker_cls_over
from vllm_r3_plugin.wrapping import wrap_once

_journal = Journal()


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config``; with the flag off the wrap only passes on."""
    from vllm.engine.arg_utils import EngineArgs

    wrap_once(EngineArgs, "create_engine_config", _create_engine_config)


def _create_engine_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    if not releases.asks_for_routing(self):
        return original(self, *args, **kwargs)
    if R3Options.of(self).backend == "vllm":
        return original(self, *args, **kwargs)
    with releases.native_flags_cleared(self):
        config = original(self, *args, **kwargs)
    take_over(config, releases.native_max_bytes(self))
    return config


def take_over(config: Any, max_bytes: int | None) -> None:
    """Make ``config`` run our worker and scheduler over those that it would have run.

    ``max_bytes`` is vLLM's own option for the same thing; ours comes first.

    Raises:
        ValueError: an engine whose routing cannot be captured, or a wrong option.

    """
    _require_capable(config)
    options = R3Options.of(config)
    if options.max_bytes is None:
        options = replace(options, max_bytes=max_bytes)
    seam_check.require_present(_journal)
    front_end.install()
    fetch_endpoint.install()
    engine_core.install()
    metrics.install()
    options.store_in(config)
    parallel, scheduler = config.parallel_config, config.scheduler_config
    parallel.worker_cls = worker_cls_over(parallel.worker_cls)
    scheduler.scheduler_cls = SchedulerFactory(scheduler.scheduler_cls)


def _require_capable(config: Any) -> None:
    for is_met, seen, expected, fix in _requirements(config):
        if not is_met:
            raise ValueError(
                f"--enable-return-routed-experts was given with {seen}, expected {expected}: {fix}."
            )


def _requirements(config: Any) -> Iterator[tuple[bool, str, str, str]]:
    model, parallel = config.model_config, config.parallel_config
    yield (
        model.runner_type == "generate",
        f"the {model.runner_type!r} model {model.model!r}",
        "a model that generates text",
        "remove the flag",
    )
    yield (
        model.is_moe,
        f"{model.model!r}, which has no experts",
        "a mixture-of-experts model",
        "remove the flag or serve a MoE model",
    )
    for field in (
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, field)
        yield size == 1, f"{field} {size}", "1", "set it to 1 or remove the flag"
    yield (
        not releases.verifies_adaptively(config.speculative_config),
        "adaptive speculative verification",
        "a fixed number of draft tokens",
        "switch it off or remove the flag",
    )
