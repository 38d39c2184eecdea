"""Runs drawn workloads on an engine that lives on between them, and checks all that comes back."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, example, given, seed, settings

from .engine import NGRAM_SPECULATION, ROUTER_UPDATE, force_async_scheduling, start_engine
from .lost_payloads import losing_payloads
from .resumable_session import ResumableSession
from .rollouts import Rollout, from_outputs, random_prompts
from .router_hook import RouterHook
from .tiny_models import MOE_LAYERS, NUM_EXPERTS, NUM_LAYERS, TOP_K
from .workloads import CROWDED, ENDINGS, LETTERS, WORKLOADS, Ask, Event, Workload

LONGEST_PROMPT = 130
SENTINEL = 255
ENGINES: dict[str, dict[str, Any]] = {
    "asynchronous": {"num_gpu_blocks_override": 14},
    "speculative": {
        "num_gpu_blocks_override": 20,
        "additional_config": {"r3": {"max_bytes": 24 * 32 * 12}},
        "speculative_config": NGRAM_SPECULATION,
    },
}


@dataclass
class Tally:
    """What was seen over all workloads.

    Attributes:
        counts: by name; `rows wrong but valid` are those that a reader would believe.
        for_oracle: rollouts of workloads without a change of weights, for an oracle of one model.

    """

    counts: Counter[str] = field(default_factory=Counter)
    for_oracle: list[Rollout] = field(default_factory=list)


class LiveEngine:
    """An engine whose core runs in this process, and the routers' own record of what it did.

    Args:
        llm: the engine.
        weights: the folder that it has loaded, and one that differs in the routers' weights.
        forgets: its routing store is small, so that arrays may be missing for that reason.
        drafts: it speculates; prompts are of three tokens only, which an n-gram drafter guesses.

    """

    def __init__(
        self, llm: Any, weights: tuple[Path, Path], *, forgets: bool, drafts: bool
    ) -> None:
        self.tally = Tally()
        self._llm, self._engine = llm, llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._scheduler = self._core.scheduler
        self._hook = RouterHook(llm)
        self._weights, self._swapped = weights, False
        self._forgets, self.drafts = forgets, drafts
        self._prefixes = random_prompts(np.random.default_rng(0), [LONGEST_PROMPT] * 3)
        self._conversations = list(self._prefixes)
        self._num_asked = 0

    def run(self, workload: Workload) -> None:
        """Run it to its end and check every array that comes back.

        Raises:
            AssertionError: a row is wrong, or missing without a reason.

        """
        hook, counts = self._hook, self.tally.counts
        hook.requests.clear()
        before = (hook.preempted_in_flight, hook.finished_while_preempted)
        shifted = self._scheduler.r3_journal.counts["SESSION_SHIFTED"]
        with losing_payloads(workload.lost_share) as lost:
            served = _Served(self, workload)
            served.to_the_end()
        rollouts = hook.attach_to(served.finished + served.aborted)
        counts["workloads"] += 1
        counts["requests"] += served.num_requests
        counts["turns of sessions"] += served.num_turns
        counts["payloads lost"] += sum(lost)
        counts["weight swaps"] += served.num_swaps
        counts["aborted in flight"] += served.aborted_in_flight
        counts["aborted with rows"] += len(served.aborted)
        counts["preempted in flight"] += hook.preempted_in_flight - before[0]
        counts["finished while preempted"] += hook.finished_while_preempted - before[1]
        counts["preempted"] += sum(r.num_preemptions > 0 for r in hook.requests.values())
        counts["prefix hits"] += sum(r.num_cached > 0 for r in rollouts)
        counts["rows recomputed otherwise"] += sum(r.superseded for r in rollouts)
        counts["garbled by vLLM"] += sum(r.is_garbled for r in rollouts)
        counts["sessions lost by vLLM"] += served.num_lost_sessions
        shifted = self._scheduler.r3_journal.counts["SESSION_SHIFTED"] - shifted
        may_be_missing = any(lost) or self._forgets or shifted > 0
        complete = [
            rollout
            for rollout in rollouts
            if self._check(
                served.asked[rollout.request], rollout, may_be_missing or rollout.is_garbled
            )
        ]
        garbled = any(request.is_garbled for request in hook.requests.values())
        if not served.num_swaps and not garbled:
            self.tally.for_oracle += complete
        self._conversations = [*self._conversations, *(r.tokens for r in served.finished)][-64:]
        if served.num_swaps or any(lost) or garbled:
            if self._swapped:
                self.swap_routers()
            assert self._llm.reset_prefix_cache()

    def swap_routers(self) -> None:
        self._swapped = not self._swapped
        self._llm.collective_rpc("load_routers", args=(str(self._weights[self._swapped]),))

    def limit_steps(self, workload: Workload) -> None:
        from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

        scheduler = self._scheduler
        scheduler.policy = SchedulingPolicy(workload.policy)
        scheduler.waiting = create_request_queue(scheduler.policy)
        scheduler.kv_holding_waiting = create_request_queue(scheduler.policy)
        scheduler.scheduler_config.long_prefill_token_threshold = workload.longest_chunk
        scheduler.max_num_scheduled_tokens = workload.tokens_per_step
        scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = workload.running

    def new_name(self) -> str:
        self._num_asked += 1
        return str(self._num_asked)

    def prompts(self, ask: Ask) -> list[list[int]]:
        """The prompt of each turn."""
        if ask.prefix is None:
            shared = self._conversations[-1 - ask.shared % len(self._conversations)]
        else:
            shared = self._prefixes[ask.prefix][: ask.shared]
        first, *later = random_prompts(np.random.default_rng(ask.seed), [ask.own] * ask.turns)
        prompts = [shared[: LONGEST_PROMPT - ask.own] + first, *later]
        if self.drafts:
            return [[LETTERS[token % 3] for token in prompt] for prompt in prompts]
        return prompts

    def _check(self, ask: Ask, rollout: Rollout, may_be_missing: bool) -> bool:
        """Compare with what the routers did; says whether there is a row for every token."""
        counts = self.tally.counts
        if ask.routing == "off":
            assert rollout.routed is None, f"an array for a request without routing: {rollout}"
            counts["requests without routing"] += 1
            return False
        if rollout.routed is None:
            counts["arrays withheld"] += 1
            seen = dict(self._scheduler.r3_journal.counts)
            assert may_be_missing, f"no array, though nothing was lost ({seen}): {rollout}"
            return False
        assert rollout.hooked is not None
        ids = rollout.moe_ids()
        unrecorded = (ids == SENTINEL).all((1, 2))
        if unrecorded.any():
            assert ask.unrecorded == "sentinel", f"not asked to mark rows: {rollout}"
            assert may_be_missing, f"rows are unrecorded, though nothing was lost: {rollout}"
        wrong = (ids != rollout.hooked[rollout.prompt_start :]).any((1, 2)) & ~unrecorded
        ordered = np.sort(ids, axis=-1)
        distinct = (ordered[..., 1:] != ordered[..., :-1]).all((1, 2))
        counts["rows marked unrecorded"] += int(unrecorded.sum())
        counts["rows checked"] += int((~unrecorded).sum())
        counts["rows wrong"] += int(wrong.sum())
        counts["rows wrong but valid"] += int(
            (wrong & distinct & (ids < NUM_EXPERTS).all((1, 2))).sum()
        )
        assert not wrong.any(), f"rows {np.flatnonzero(wrong)} are wrong: {rollout}"
        return not unrecorded.any()


class _Served:
    """One workload under way; everything in it happens before a step that is known ahead."""

    def __init__(self, live: LiveEngine, workload: Workload) -> None:
        self.finished: list[Rollout] = []
        self.aborted: list[Rollout] = []
        self.num_requests = self.num_turns = self.num_swaps = self.aborted_in_flight = 0
        self.num_lost_sessions = 0
        self._live, self._llm, self._engine = live, live._llm, live._engine
        self._core, self._scheduler = live._core, live._scheduler
        self.asked: dict[str, Ask] = {}
        self._starts: dict[str, int] = {}
        self._sessions: dict[str, ResumableSession] = {}
        live.limit_steps(workload)
        self._agenda: list[tuple[int, Callable[[], None]]] = [
            *((ask.arrival, partial(self._add, ask)) for ask in workload.asks),
            *((event.step, partial(self._happen, event)) for event in workload.events),
        ]

    def to_the_end(self) -> None:
        step = 0
        while self._agenda or self._engine.has_unfinished_requests():
            due = [act for when, act in self._agenda if when <= step]
            self._agenda = [(when, act) for when, act in self._agenda if when > step]
            for act in due:
                act()
            for output in self._engine.step():
                self._take(output)
            self._end_lost_sessions()
            step += 1
            assert step < 2000, "the engine does not come to an end"

    def _end_lost_sessions(self) -> None:
        """Up to 0.32 vLLM forgets a session whose turn ends while it is preempted."""
        scheduler = self._scheduler
        for name, session in self._sessions.items():
            request = scheduler.requests.get(session.request_id)
            queues = (scheduler.running, scheduler.waiting, scheduler.kv_holding_waiting)
            if request is not None and not any(request in queue for queue in queues):
                self.num_lost_sessions += 1
                self._engine.abort_request([name])
                self._agenda = [(when, act) for when, act in self._agenda if act != session.send]

    def _take(self, output: Any) -> None:
        name = output.request_id
        if name in self._sessions:
            if output.outputs[0].finish_reason not in (None, "abort"):
                self.finished.append(self._sessions[name].turn_ended(output))
                self.num_turns += 1
        elif output.finished:
            self.finished += from_outputs([output], [self._starts[name]])

    def _add(self, ask: Ask) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name, prompts = self._live.new_name(), self._live.prompts(ask)
        # VLLM takes no KV blocks from sessions that wait: two can wait for each other's for ever.
        is_session = ask.turns > 1 and not self._sessions and ask.ending != "stop string"
        # vLLM checks a session's against the prompt of each turn.
        start = 0 if is_session else int(ask.start * len(prompts[0]))
        params = SamplingParams(
            temperature=1.0,
            max_tokens=ask.max_tokens,
            n=1 if is_session else ask.samples,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={
                "r3_routing": ask.routing,
                "r3_unrecorded": ask.unrecorded,
                "r3_start": start,
            },
            **{"detokenize": False, **ENDINGS[ask.ending]},
        )
        self.asked[name] = ask
        self._starts[name] = start
        self.num_requests += params.n
        if is_session:
            params.prompt_logprobs = None
            session = ResumableSession(self._engine, name, params, prompts)
            self._sessions[name] = session
            self._agenda += [
                (ask.arrival + turn * ask.pause, session.send) for turn in range(1, ask.turns)
            ]
        else:
            self._engine.add_request(
                name, {"prompt_token_ids": prompts[0]}, params, priority=ask.priority
            )
        # Sessions that end early have tests of their own: a turn that comes later begins a new one.
        if ask.abort is not None and not is_session:
            self._agenda.append((ask.arrival + ask.abort, partial(self._abort, name)))

    def _happen(self, event: Event) -> None:
        if event.kind == "swap":
            self._live.swap_routers()
            self.num_swaps += 1
        elif event.kind == "reset":
            self._llm.reset_prefix_cache()
        elif event.kind == "reset running":
            try:
                assert self._llm.reset_prefix_cache(reset_running_requests=True)
            except RuntimeError:
                # vLLM cannot while a session that awaits its next prompt holds KV blocks.
                assert self._sessions

    def _abort(self, name: str) -> None:
        """End a request as its client does."""
        fetch = self.asked[name].fetches
        internal = list(self._engine.output_processor.external_req_ids.get(name, ()))
        found = map(self._scheduler.requests.get, internal)
        requests = [r for r in found if r is not None and not r.is_finished()]
        self.aborted_in_flight += sum(r.num_in_flight_tokens > 0 for r in requests)
        rows = self._core.moe_r3_abort([r.request_id for r in requests]) if fetch else {}
        self._engine.abort_request([name])
        for request in requests:
            if not fetch or not request.num_output_tokens:
                continue
            routed = None
            if request.request_id in rows:
                shape, data = rows[request.request_id]
                routed = self._native(np.frombuffer(data, np.uint8).reshape(shape))
            index, _, is_sample = request.request_id.partition("_")
            self.aborted.append(
                Rollout(
                    name,
                    int(index) if is_sample else 0,
                    list(request.prompt_token_ids),
                    list(request.output_token_ids),
                    routed,
                    "abort",
                    prompt_start=self._starts[name],
                )
            )

    def _native(self, array: np.ndarray) -> np.ndarray | None:
        """The rows in vLLM's own form, unless one of them is unrecorded."""
        from vllm_r3_plugin.in_flight import rows_of

        ids, status = rows_of(array, self._scheduler.r3_layout)
        if status.any():
            return None
        routed = np.zeros((len(ids), NUM_LAYERS, TOP_K), ids.dtype)
        routed[:, list(MOE_LAYERS)] = ids
        return routed


def run_workloads(
    model: Path, other_model: Path, name: str, examples: int, random_seed: int | None
) -> Tally:
    """Run drawn workloads on one engine, the same ones in every run with the same seed."""
    if name == "asynchronous":
        force_async_scheduling()
    llm = start_engine(
        model, skip_tokenizer_init=False, worker_extension_cls=ROUTER_UPDATE, **ENGINES[name]
    )
    speculates = name == "speculative"
    live = LiveEngine(llm, (model, other_model), forgets=speculates, drafts=speculates)

    # The engine remembers earlier workloads, so a smaller one would prove nothing by itself.
    @settings(
        max_examples=examples,
        derandomize=random_seed is None,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(WORKLOADS)
    @example(CROWDED)
    def run(workload: Workload) -> None:
        # hypothesis asks again for what failed; the engine has moved on by then.
        if failures:
            raise failures[0]
        try:
            live.run(workload)
        except Exception as error:
            failures.append(error)
            raise

    failures: list[Exception] = []
    (run if random_seed is None else seed(random_seed)(run))()
    return live.tally
