"""Whatever raises in the plugin: the engine goes on, and no row that is returned is wrong.

Every function that runs while an engine serves is made to fail, before or after it has done its
work, on engines that stay alive through all of it. Preemption, prefix-cache hits, resets, aborts,
stop strings and swapped router weights go on meanwhile: a row that replaces another shows.
"""

import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_r3_plugin import front_end
from vllm_r3_plugin.capturer import find_routers

from .rigs.engine import NGRAM_SPECULATION, force_async_scheduling, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.faults import MISFITS, FaultPoint, InjectedError, failing, fault_points, misfitting
from .rigs.rollouts import Rollout, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.tiny_models import NUM_LAYERS, TOP_K
from .rigs.transformers_oracle import TransformersOracle

MODULES = (
    *("capturer", "kv_blocks", "page_pool", "page_store", "published_pages", "received_rows"),
    *("request_slots", "row_sender", "runner_batch", "scheduler", "step_capture", "step_rows"),
)
UNGUARDED = {
    # At start-up, where an error is a refusal.
    *("_attribute_attacher", "_build_store", "_chained", "_router_attacher", "_sink_attacher"),
    *("LayerCapture.__init__", "PageStore.__init__", "RoutingCapturer.__init__"),
    *("RowSender.__init__", "StepCapture.__init__", "capture_dtype", "find_routers"),
    *("KVBlocks._watch_allocations", "routing_scheduler"),
    # They hold the guards around what they call, and vLLM's own part.
    *("LayerCapture.__call__", "RoutingScheduler._r3_guard", "StepCapture._attach"),
    *("StepCapture._send", "StepCapture.execute_model", "StepCapture.sample_tokens"),
}
AFTER_A_FAULT = {
    *("PageStore.repair", "RoutingScheduler._r3_give_up", "RoutingScheduler._r3_start_over"),
    *("RowSender.withdraw", "_build_store"),
}
ONLY_SPECULATIVE = {
    *("PageStore.settle", "RoutingScheduler._r3_settle", "PageStore.start_generation"),
    *("PageStore.write", "PageStore._truncate"),
}
"""What only a synchronous engine with drafts reaches, and what is another thing there."""
AT_RELOAD = {"RoutingCapturer.bind"}
REACHED = {
    *("KVBlocks._renumber", "LayerCapture._write", "RoutingCapturer.arm", "RoutingCapturer.bind"),
    *("RoutingCapturer.copy_rows", "RoutingCapturer.unreported_layers", "batch_of"),
    *("StageRows.finish", "StepCapture._take_snapshot", "StepRows.misfit", "attach_rows"),
    *("PageStore.admit", "PageStore.resolve", "PageStore.write", "PageStore.settle"),
    *("PageStore.read", "PageStore.release", "PageStore.start_generation", "PageStore._publish"),
    *("RoutingScheduler._r3_admit", "RoutingScheduler._r3_store_step"),
    *("RoutingScheduler._r3_release_retired", "RowSender.send"),
    *("RoutingScheduler.r3_rows_of_aborted", "RoutingScheduler._r3_set_aside"),
    *(f"{name} after others" for name in AFTER_A_FAULT),
    *MISFITS,
}
"""What must have failed, among all else."""

ENGINES: dict[str, dict[str, Any]] = {
    "asynchronous": {},
    "speculative": {"speculative_config": NGRAM_SPECULATION},
}
LETTERS = [64, 65, 66]  # a, b, c


def _points() -> dict[str, FaultPoint]:
    return {point.name: point for point in fault_points(MODULES)}


def _is_guarded(name: str) -> bool:
    owner, _, method = name.rpartition(".")
    is_vllms = owner == "RoutingScheduler" and "r3_" not in method
    return not is_vllms and name not in UNGUARDED | AFTER_A_FAULT


def _scenarios(seed: int) -> Iterator[tuple[str, Any]]:
    """Every function alone, recoveries that fail as well, and payloads that do not fit."""
    rng = np.random.default_rng(seed)
    ways = int(os.environ.get("MOE_R3_FAULTS_PER_FUNCTION", "1"))
    points = _points()
    if seed and ways == 1:
        points = {name: point for name, point in points.items() if name in ONLY_SPECULATIVE}
    for name, point in points.items():
        for way in range(ways if _is_guarded(name) else 0):
            calls, after = {1, int(rng.integers(2, 20))}, bool((seed + way) % 2)
            error = (InjectedError, MemoryError)[(way + len(name)) % 2]
            yield name, failing(point, calls, after=after, error=error)
    if seed and ways == 1:
        return
    for name, alter in MISFITS.items():
        yield name, misfitting(alter)
    for name in sorted(AFTER_A_FAULT):
        yield (
            f"{name} after others",
            _failing_together("PageStore.write", "RowSender.send", "PageStore.repair", name),
        )


@contextmanager
def _failing_together(*names: str) -> Iterator[list[int]]:
    points = _points()
    with ExitStack() as stack:
        yield [
            stack.enter_context(failing(points[name], {1, 2}, after=False, error=InjectedError))
            for name in dict.fromkeys(names)
        ][-1]


def _disturbed(seed: int) -> tuple[list[list[int]], list[Any]]:
    """Requests of all kinds that are treated apart: hits, preemption, stop strings, drafts."""
    prompts, params = workload(12, seed=seed, max_tokens=16)
    prompts = [[LETTERS[token % 3] for token in prompt] for prompt in prompts]
    for i, param in enumerate(params):
        if i % 2:
            param.allowed_token_ids = LETTERS
        if i % 5 == 0:
            param.stop, param.detokenize, param.allowed_token_ids = ["abc"], True, LETTERS
            param.max_tokens = 40
    return prompts, params


def _undisturbed(seed: int) -> tuple[list[list[int]], list[Any]]:
    from vllm import SamplingParams

    prompts = random_prompts(np.random.default_rng(seed), [40, 40])
    return prompts, [SamplingParams(max_tokens=4, detokenize=False)] * 2


class _Rig:
    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        self.llm = start_engine(
            model, num_gpu_blocks_override=14, skip_tokenizer_init=False, **settings
        )
        self.hook = RouterHook(self.llm)
        self.journal = self.hook.scheduler.r3_journal
        modules = self.hook.runner.get_model().modules()
        self.scenario = ""
        self.gates = [m.gate.weight for m in modules if hasattr(m, "gate")]

    def disturb(self, step: int) -> None:
        """Other router weights and back; a reset; an abort as by a client."""
        from vllm import SamplingParams

        if step in (6, 14):
            for gate in self.gates:
                gate.data.copy_(gate.data.flip(0).clone())
        if step == 14 and self.scenario in AT_RELOAD:
            self.llm.collective_rpc("reload_weights")
        if step == 10:
            self.llm.reset_prefix_cache(reset_running_requests=True)
        if step == 1:
            endless = SamplingParams(max_tokens=200, ignore_eos=True, detokenize=False)
            self.llm.llm_engine.add_request("leaves", {"prompt_token_ids": LETTERS * 9}, endless)
        if step == 5:
            leaving = [name for name in self.hook.scheduler.requests if name.startswith("leaves-")]
            core = self.llm.llm_engine.engine_core.engine_core
            # A utility call: the engine core would answer the front end with the error.
            with suppress(InjectedError, MemoryError):
                core.moe_r3_abort(leaving)
            self.llm.llm_engine.abort_request(leaving, internal=True)

    def run(self, seed: int, name: str, fault: Any, report: dict[str, Any]) -> None:
        noted = self.journal.counts.total() - self.journal.counts["rows_captured"]
        self.scenario = name
        with fault as made:
            rollouts = self.hook.attach_to(generate(self.llm, *_disturbed(seed), self.disturb))
        if made:
            report["failed"][name] += 1
            counts = self.journal.counts.total() - self.journal.counts["rows_captured"]
            report["silent"] += [name] * (counts == noted)
        report["returned"].update(rollout.routed is not None for rollout in rollouts)
        report["wrong"] += [(name, r.request) for r in rollouts if _is_wrong(r)]
        afterwards = self.hook.attach_to(generate(self.llm, *_undisturbed(10_000 + seed)))
        if any(r.routed is None or _is_wrong(r) for r in afterwards):
            report["lasting"].append(name)

    def refusals(self) -> dict[str, str]:
        """What is said of each kernel of vLLM that routes by itself and does not report."""
        from vllm.model_executor.layers.fused_moe import modular_kernel
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        model = self.hook.runner.get_model()
        layer = next(m for m in model.modules() if isinstance(m, MoERunner) and m.layer_id == 2)
        kernel = object.__new__(modular_kernel.FusedMoEKernel)
        kernel.impl = object.__new__(modular_kernel.FusedMoEKernelMonolithicImpl)
        layer.routed_experts.quant_method.moe_kernel = kernel
        said = {}
        for cls in _monolithic_kernels():
            kernel.impl.fused_experts = object.__new__(cls)
            try:
                list(find_routers(model, NUM_LAYERS, TOP_K))
            except ValueError as refusal:
                said[cls.__name__] = str(refusal)
        return said


def _monolithic_kernels() -> list[type]:
    from vllm.model_executor.layers.fused_moe import experts
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic

    for module in pkgutil.iter_modules(experts.__path__):
        importlib.import_module(f"{experts.__name__}.{module.name}")
    return FusedMoEExpertsMonolithic.__subclasses__()


def _is_wrong(rollout: Rollout) -> bool:
    """Whether routed experts were returned that are not those of the rollout, row by row."""
    if rollout.routed is None:
        return False
    if len(rollout.routed) != len(rollout.tokens) - 1:
        return True
    return rollout.ordered_differences() > 0


def _run(model: Path, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    if not settings:
        force_async_scheduling()
    rig = _Rig(model, settings)
    report: dict[str, Any] = {
        "failed": Counter(),
        "returned": Counter(),
        "wrong": [],
        "lasting": [],
        "silent": [],
    }
    scenarios = list(enumerate(_scenarios(seed)))
    for number, (name, fault) in scenarios:
        if name not in AT_RELOAD:
            rig.run(number, name, fault, report)
    report["afterwards"] = rig.hook.attach_to(generate(rig.llm, *workload(40, seed=1)))
    # vLLM's reload changes what experts compute on CPU: transformers is no oracle behind it.
    for number, (name, fault) in scenarios:
        if name in AT_RELOAD:
            rig.run(number, name, fault, report)
    report["preempted"] = sum(r.num_preemptions > 0 for r in rig.hook.requests.values())
    report["counts"] = dict(rig.journal.counts)
    report["refusals"] = rig.refusals()
    return report


@pytest.fixture(scope="module")
def reports(moe_model: Path) -> dict[str, dict[str, Any]]:
    return {
        name: run_in_engine_process(_run, moe_model, seed, settings)
        for seed, (name, settings) in enumerate(ENGINES.items())
    }


@pytest.fixture(scope="module", params=list(ENGINES))
def report(request: pytest.FixtureRequest, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return reports[request.param]


def test_no_row_that_is_returned_is_wrong(report: dict[str, Any]) -> None:
    assert report["wrong"] == []
    assert report["returned"][True] > report["returned"][False]
    assert report["preempted"] >= 5


def test_once_a_fault_is_over_every_request_has_its_routing(
    report: dict[str, Any], oracle: TransformersOracle
) -> None:
    assert report["lasting"] == []
    assert oracle.agreement(report["afterwards"]).differing == 0


def test_every_fault_is_counted(report: dict[str, Any]) -> None:
    assert report["silent"] == []


def test_what_is_called_while_an_engine_serves_was_made_to_fail(
    reports: dict[str, dict[str, Any]],
) -> None:
    assert {name for report in reports.values() for name in report["failed"]} >= REACHED


def test_a_kernel_that_does_not_report_is_refused_by_layer_and_name(
    report: dict[str, Any],
) -> None:
    """The model is the engine's own, its third layer given each of vLLM's kernels in turn."""
    assert set(report["refusals"]) == {
        "AiterW4A16ExpertsMonolithic",
        "AiterW4A8ExpertsMonolithic",
        "CPUExpertsInt4",
        "OAITritonMxfp4ExpertsMonolithic",
        "ZentorchExpertsInt4",
    }
    for name, said in report["refusals"].items():
        assert f"'model.layers.2.mlp.experts' cannot be captured: its kernel {name} routes" in said


def test_an_output_that_cannot_be_read_has_no_routed_experts() -> None:
    class Output:
        routed_experts = "not an array"
        finish_reason = "stop"

    output = front_end._new_completion_output(lambda self: Output(), None)
    assert output.routed_experts is None
