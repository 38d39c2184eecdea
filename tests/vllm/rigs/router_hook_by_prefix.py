"""The router hook for KV caches of several groups, or that forget what left a sliding window."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .rollouts import Rollout
from .router_hook import RouterHook


class RouterHookByPrefix(RouterHook):
    """Knows the rows of a prefix-cache hit by the tokens before them, not by KV slots.

    Right where the same tokens always have the same rows: one set of weights, in float32.
    """

    def __init__(self, llm: Any) -> None:
        super().__init__(llm)
        # All rows [L_moe, k] that the routers chose for a token behind the same tokens.
        self.rows_behind: dict[bytes, list[np.ndarray]] = defaultdict(list)

    def _record(self, tokens: np.ndarray, positions: np.ndarray) -> None:
        ids = np.stack([self._layers[layer] for layer in sorted(self._layers)], axis=1)
        scheduled = self._scheduled
        resumed = scheduled.scheduled_cached_reqs.resumed_req_ids
        fresh = {r.req_id for r in scheduled.scheduled_new_reqs} | resumed
        pieces = []
        offset = 0
        for name in self.runner.input_batch.req_ids:
            piece = slice(offset, offset + scheduled.num_scheduled_tokens[name])
            offset = piece.stop
            position = positions[piece]
            prefixes = _prefixes(self.scheduler.requests[name].all_token_ids)
            for p, row in zip(position.tolist(), ids[piece], strict=True):
                self.rows_behind[prefixes[p]].append(row)
            self.requests[name].rows.append((self.steps, position, tokens[piece], ids[piece]))
            pieces.append((name, int(position[0]), prefixes))
        # After all: a request may hit blocks that another one fills in the same step.
        for name, num_hit, prefixes in pieces:
            if name in fresh and num_hit:
                hit = np.stack([self.rows_behind[prefix][0] for prefix in prefixes[:num_hit]])
                self.requests[name].rows.append((self.steps, np.arange(num_hit), None, hit))
                self.hits += name not in resumed

    def foreign_rows(self, rollout: Rollout) -> int:
        """Rows that no router chose behind these tokens, slot order included."""
        rows = zip(_prefixes(rollout.tokens[:-1]), rollout.moe_ids(), strict=True)
        return sum(
            not any((row == chosen).all() for chosen in self.rows_behind[prefix])
            for prefix, row in rows
        )


def _prefixes(tokens: Sequence[int]) -> list[bytes]:
    """The tokens up to and with each position."""
    whole = np.array(tokens, np.uint16).tobytes()
    return [whole[: 2 * p + 2] for p in range(len(tokens))]
