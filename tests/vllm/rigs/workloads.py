"""Workloads that hypothesis draws: requests, when they arrive, and what happens meanwhile."""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from .tiny_models import EOS_TOKEN_ID

LETTERS = [97, 98, 99]
ENDINGS: dict[str, dict[str, Any]] = {
    "length": {"ignore_eos": True},
    "EOS": {"allowed_token_ids": [EOS_TOKEN_ID, *LETTERS]},
    "stop token": {"allowed_token_ids": LETTERS, "stop_token_ids": LETTERS[:1]},
    "stop string": {"allowed_token_ids": LETTERS, "stop": ["ab", "cba"], "detokenize": True},
    "prompt logprobs": {"prompt_logprobs": 0, "logprobs": 1},
}


@dataclass(frozen=True)
class Ask:
    """One request, or a session of several turns.

    Attributes:
        arrival: step before which it arrives.
        prefix: the common text that its prompt begins with; `None` goes on where an earlier
            request of this engine ended.
        shared: tokens of that text.
        own: tokens of its own; equal `seed` and `own`, equal tokens.
        seed: see `own`.
        max_tokens: of each turn.
        ending: one of `ENDINGS`.
        samples: completions of the prompt.
        start: share of the prompt whose rows are not asked for.
        routing: `"on"` or `"off"`.
        unrecorded: `"omit"` or `"sentinel"`.
        abort: steps after its arrival at which its client ends it; not for sessions.
        fetches: whether that client takes the rows of the tokens so far.
        turns: prompts of a resumable session; each of the later ones has `own` tokens.
        pause: steps between the arrivals of two turns.
        priority: the lowest runs first, and is preempted last, where the workload's policy says so.

    """

    arrival: int
    prefix: int | None
    shared: int
    own: int
    seed: int
    max_tokens: int
    ending: str
    samples: int
    start: float
    routing: str = "on"
    unrecorded: str = "omit"
    abort: int | None = None
    fetches: bool = True
    turns: int = 1
    pause: int = 0
    priority: int = 0


@dataclass(frozen=True)
class Event:
    """What happens to the engine before `step`."""

    step: int
    kind: str


@dataclass(frozen=True)
class Workload:
    """Requests, events, and what the scheduler may put into one step."""

    asks: list[Ask]
    events: list[Event]
    lost_share: float
    longest_chunk: int
    tokens_per_step: int
    running: int
    policy: str = "fcfs"


_DECODING = Ask(0, 0, 0, own=40, seed=0, max_tokens=32, ending="length", samples=1, start=0.0)
# Twelve of 13 blocks are taken when five requests want another one at once: the last request is
# preempted while its last token is in flight, another in the middle of its output. Nothing of that
# depends on the tokens.
CROWDED = Workload(
    asks=[
        replace(_DECODING, seed=10, abort=29),
        *(replace(_DECODING, seed=seed) for seed in range(11, 15)),
        replace(_DECODING, seed=15, max_tokens=25),
    ],
    events=[],
    lost_share=0.0,
    longest_chunk=0,
    tokens_per_step=256,
    running=32,
)

_ASKS = st.builds(
    Ask,
    arrival=st.integers(0, 20),
    prefix=st.none() | st.integers(0, 2),
    shared=st.sampled_from([0, 31, 32, 33, 64, 90]),
    own=st.integers(1, 40),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 32),
    ending=st.sampled_from(list(ENDINGS)),
    samples=st.sampled_from([1, 1, 1, 2]),
    start=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    routing=st.sampled_from(["on"] * 7 + ["off"]),
    unrecorded=st.sampled_from(["omit", "omit", "sentinel"]),
    abort=st.none() | st.none() | st.integers(0, 20),
    fetches=st.booleans(),
    turns=st.sampled_from([1, 1, 1, 1, 2, 3]),
    pause=st.integers(0, 15),
    priority=st.integers(0, 2),
)
_EVENTS = st.builds(
    Event,
    step=st.integers(0, 40),
    kind=st.sampled_from(["reset", "reset running", "swap"]),
)
WORKLOADS = st.builds(
    Workload,
    asks=st.lists(_ASKS, min_size=6, max_size=32),
    events=st.lists(_EVENTS, max_size=5),
    lost_share=st.sampled_from([0.0] * 6 + [0.02, 0.2]),
    longest_chunk=st.sampled_from([0, 7, 40]),
    tokens_per_step=st.sampled_from([48, 128, 256]),
    running=st.sampled_from([2, 8, 32]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
