"""The worker: the platform's own worker class, with routing captured and sent along.

vLLM asks this module for a class by name. The name spells the class that would have run without
us, so that a user's own worker class keeps working: ``over:package:module:Class``.
"""

from __future__ import annotations

import socket
from typing import Any

from shared_schema import RoutingLayout
from vllm_r3_plugin import releases
from vllm_r3_plugin.capturer import RouterSource, RoutingCapturer, find_routers
from vllm_r3_plugin.forward_layout import ForwardLayout
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.options import PLUGIN_VERSION, R3Options
from vllm_r3_plugin.pipeline_rows import connect_stages
from vllm_r3_plugin.step_capture import StepCapture
from vllm_r3_plugin.step_rows import capture_dtype

_OVER = "over:"


class RoutingCaptureWorker:
    """Mixin over a vLLM worker class: captures routed experts and sends each step's rows along."""

    vllm_config: Any
    model_runner: Any
    _r3_capturer: RoutingCapturer | None = None
    _r3_journal: Journal

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then listen to the routers: before any graph is captured or compiled."""
        from vllm.distributed.parallel_state import get_pp_group

        super().load_model(*args, **kwargs)  # type: ignore[misc]
        R3Options.of(self.vllm_config).require_version(PLUGIN_VERSION, socket.gethostname())
        journal = self._r3_journal = Journal()
        config = self.vllm_config.model_config
        sources = self._r3_sources()
        num_experts = config.get_num_experts()
        top_k = _common_top_k(sources, releases.experts_per_token(config))
        if sources:
            layout = RoutingLayout(
                num_experts=num_experts,
                top_k=top_k,
                moe_layers=_distinct_layers(sources),
                num_hidden_layers=config.get_total_num_hidden_layers(),
            )
            parallel = self.vllm_config.parallel_config
            self._r3_capturer = RoutingCapturer(
                layout,
                self.model_runner.max_num_tokens,
                self.model_runner.device,
                ForwardLayout.of(parallel, journal),
                parallel.use_ubatching,
            )
            self._r3_capturer.bind(sources)
        link = None
        if self._r3_is_heard:
            link = connect_stages(len(sources), top_k, capture_dtype(num_experts, top_k), journal)
            is_last = get_pp_group().is_last_rank
            StepCapture(self.model_runner, self._r3_capturer, link, is_last, journal)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Reload, then listen again: kernels may have been rebuilt."""
        super().reload_weights(*args, **kwargs)  # type: ignore[misc]
        # Routers that are not heard any more show, step by step.
        with self._r3_journal.guard("listening to the routers after a reload"):
            if self._r3_capturer is not None:
                self._r3_capturer.bind(self._r3_sources())

    def moe_r3_report(self) -> dict[str, Any]:
        """What the engine core asks every worker at start-up."""
        capturer = self._r3_capturer
        return {
            "host": socket.gethostname(),
            "version": PLUGIN_VERSION,
            "layout": None if capturer is None else capturer.layout.to_dict(),
        }

    @property
    def _r3_is_heard(self) -> bool:
        """Whether an engine core reads this worker's outputs, or those of its pipeline's end."""
        from vllm.distributed.parallel_state import get_tp_group

        backend = self.vllm_config.parallel_config.distributed_executor_backend
        return bool(get_tp_group().is_first_rank or backend == "external_launcher")

    def _r3_sources(self) -> list[RouterSource]:
        config = self.vllm_config.model_config
        return list(
            find_routers(
                self.model_runner.get_model(),
                config.get_total_num_hidden_layers(),
                releases.experts_per_token(config),
            )
        )


def _common_top_k(sources: list[RouterSource], default: int) -> int:
    by_top_k = {source.top_k: source.name for source in sources}
    if len(by_top_k) > 1:
        raise ValueError(
            f"the MoE layers choose different numbers of experts ({by_top_k}), expected the same "
            "in all: serve this model without --enable-return-routed-experts."
        )
    return next(iter(by_top_k), default)


def _distinct_layers(sources: list[RouterSource]) -> tuple[int, ...]:
    by_layer = {source.layer: source.name for source in sources}
    for source in sources:
        last = by_layer[source.layer]
        if source.name != last:
            raise ValueError(
                f"layer {source.layer} routes in {source.name!r} and in {last!r}, expected one "
                "router in each layer: serve this model without --enable-return-routed-experts."
            )
    return tuple(sorted(by_layer))


def worker_cls_over(base: str) -> str:
    """Name under which vLLM finds, in every process, our worker over the class named ``base``."""
    return f"{__name__}.{_OVER}{base.replace('.', ':')}"


def __getattr__(name: str) -> type:
    if not name.startswith(_OVER):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.utils.import_utils import resolve_obj_by_qualname

    base = resolve_obj_by_qualname(name.removeprefix(_OVER).replace(":", "."))
    bases = (RoutingCaptureWorker, base)
    composed = type(f"RoutingCapture{base.__name__}", bases, {"__module__": __name__})
    globals()[name] = composed
    return composed
