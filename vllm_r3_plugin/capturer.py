"""Copies what the routers choose into one buffer at a fixed address."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from shared_schema import RoutingLayout
from vllm_r3_plugin import releases
from vllm_r3_plugin.forward_layout import ForwardLayout
from vllm_r3_plugin.host_copy import HostCopy, on_host
from vllm_r3_plugin.journal import logger
from vllm_r3_plugin.step_rows import capture_dtype

CaptureFn = Callable[[torch.Tensor], None]


class RouterSource(NamedTuple):
    """One router of the model: where it is, and how to hear of its choices."""

    layer: int
    name: str
    top_k: int
    attach: Callable[[CaptureFn], None]


class LayerCapture:
    """Callback of one router: writes its logical expert ids, a single device copy.

    It is traced by Dynamo on CPU and recorded in CUDA graphs elsewhere, so it holds no state but
    the buffer, and is not run where the graph is: there only tracing and recording can fail, at
    start-up. ``layout`` finds the step's tokens where a router may see others; ``then`` is the
    callback that was bound before, if any.
    """

    def __init__(
        self,
        column: torch.Tensor,
        layout: ForwardLayout | None = None,
        then: CaptureFn | None = None,
    ) -> None:
        self.column = column
        self.layout = layout
        self.then = then

    def __call__(self, topk_ids: torch.Tensor) -> None:
        """Write ``[n, k]`` ids of the step's n tokens."""
        try:
            self._write(topk_ids)
        except Exception:
            # In an eager forward. The last row stays as armed: the step's rows are unusable.
            logger.debug("moe-r3: a router's choice was not captured", exc_info=True)
        if self.then is not None:
            self.then(topk_ids)

    def _write(self, topk_ids: torch.Tensor) -> None:
        top_k = self.column.shape[1]
        if topk_ids.shape[1] < top_k:  # one column would be broadcast
            raise ValueError(f"a router chose {topk_ids.shape[1]} experts, expected {top_k}")
        # Fused shared experts follow the routed ones as further columns.
        ids = topk_ids[:, :top_k]
        if self.layout is None:
            self.column[: ids.shape[0]] = ids
        else:
            self.layout.write_own_rows(self.column, ids)


class RoutingCapturer:
    """Capture buffer ``[max_tokens, L, k]`` of one worker.

    Args:
        layout: the model's layers that route.
        max_tokens: rows of the largest step.
        device: where the routers run.
        forward_layout: where a router may see other rows than the step's.
        in_parts: whether a router may run several times in a step, each time on some of its tokens.

    """

    def __init__(
        self,
        layout: RoutingLayout,
        max_tokens: int,
        device: torch.device,
        forward_layout: ForwardLayout | None = None,
        in_parts: bool = False,
    ) -> None:
        self.layout = layout
        self.device = device
        self._forward_layout = forward_layout
        # A router that writes all rows at once has written the last one.
        self._marked = slice(None) if in_parts else slice(-1, None)
        self._dtype = capture_dtype(layout.num_experts, layout.top_k)
        self._fill = int(np.iinfo(self._dtype).max)
        # torch computes little in uint16; the same bits in int16 copy everywhere.
        dtype = torch.uint8 if self._dtype.itemsize == 1 else torch.int16
        self._torch_fill = self._fill if dtype is torch.uint8 else -1
        shape = (max_tokens, layout.num_moe_layers, layout.top_k)
        self._buffer = torch.full(shape, self._torch_fill, dtype=dtype, device=device)
        self._rows = on_host(self._buffer)
        self._copied_as = None if self._dtype.itemsize == 1 else self._dtype
        self._unwritten = np.full(layout.top_k, self._fill, self._dtype).tobytes()

    def bind(self, sources: list[RouterSource]) -> None:
        """Listen to every router; what listened before still hears it. May be called again."""
        for source in sources:
            column = self._buffer[:, self.layout.moe_layers.index(source.layer)]
            source.attach(LayerCapture(column, self._forward_layout))

    def arm(self, num_tokens: int) -> None:
        """Before a forward over ``num_tokens``: mark rows, until a router writes them."""
        self._rows[:num_tokens][self._marked] = self._torch_fill

    def copy_rows(self, num_tokens: int) -> HostCopy:
        """``[N, L, k]`` ids of the step."""
        return HostCopy(self._rows, num_tokens, self._copied_as)

    def unreported_layers(self, ids: np.ndarray[Any, Any]) -> list[int]:
        """Decoder layers whose router did not report for the whole step.

        ``ids`` are those of :meth:`copy_rows`, once they have arrived. Where a router did not run,
        or ran on fewer tokens, marked rows are as armed.
        """
        marked = ids[self._marked]
        if self._unwritten not in marked.tobytes():  # numpy takes ten times as long to see it
            return []
        unwritten = (marked == self._fill).all(-1).any(0)
        return [self.layout.moe_layers[i] for i in unwritten.nonzero()[0]]


def find_routers(
    model: torch.nn.Module, num_hidden_layers: int, top_k: int
) -> Iterator[RouterSource]:
    """Yield the routers of a loaded model of ``num_hidden_layers`` layers.

    ``top_k`` is the model's; it serves modules that do not say it themselves.

    Raises:
        ValueError: a router whose choice cannot be captured; the message names its layer.

    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    for name, module in model.named_modules():
        if releases.is_capture_source(module):
            chosen, attach = top_k, _attribute_attacher(module)
        elif not isinstance(module, MoERunner):
            continue
        elif module.is_monolithic:
            chosen, attach = module.moe_config.experts_per_token, _sink_attacher(name, module)
        elif isinstance(module.router, BaseRouter):
            chosen, attach = module.router.top_k, _router_attacher(module.router)
        else:
            raise ValueError(
                f"the routing of layer {name!r} cannot be captured: its router is a "
                f"{type(module.router).__name__}, expected a BaseRouter: serve this model without "
                "--enable-return-routed-experts."
            )
        # Multi-token-prediction layers are numbered after the decoder's and draft only.
        if module.layer_id < num_hidden_layers:
            yield RouterSource(module.layer_id, name, chosen, attach)


def _chained(capture: CaptureFn, before: CaptureFn | None) -> CaptureFn:
    assert isinstance(capture, LayerCapture)
    capture.then = before.then if isinstance(before, LayerCapture) else before
    return capture


def _router_attacher(router: Any) -> Callable[[CaptureFn], None]:
    return lambda capture: router.set_capture_fn(_chained(capture, router.capture_fn))


def _attribute_attacher(module: Any) -> Callable[[CaptureFn], None]:
    def attach(capture: CaptureFn) -> None:
        module.capture_fn = _chained(capture, module.capture_fn)

    return attach


def _sink_attacher(name: str, module: Any) -> Callable[[CaptureFn], None]:
    """For kernels that route by themselves and report their choice into a buffer."""
    kernel = getattr(module.routed_experts.quant_method, "moe_kernel", None)
    experts = getattr(getattr(kernel, "impl", None), "fused_experts", None)
    if not releases.reports_its_choice(experts):
        raise ValueError(
            f"the routing of layer {name!r} cannot be captured: its kernel "
            f"{type(experts).__name__} routes by itself and does not report its choice, expected "
            "one that does: choose another with --moe-backend, for example triton."
        )

    return lambda capture: releases.listen_to_kernel(module, experts, partial(_chained, capture))
