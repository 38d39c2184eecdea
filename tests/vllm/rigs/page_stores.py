"""Page stores by themselves, whose rows spell who wrote them, and the prefix cache they follow."""

import numpy as np

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.page_store import PageStore
from vllm_r3_plugin.step_rows import StepRows

LAYOUT = RoutingLayout(num_experts=200, top_k=3, moe_layers=(1, 2), num_hidden_layers=3)
SIZE = 4
ROOMY = 400


class Blocks:
    """A prefix cache: the KV blocks of each request, and those that each key finds, in order."""

    def __init__(self):
        self.held, self.cached = {}, {}

    def fill(self, request, **blocks):
        self.held[request] = list(blocks.values())
        for key, block in blocks.items():
            found = self.cached.setdefault(key.encode(), [])
            found += [block] * (block not in found)

    def of_request(self, request):
        return self.held.get(request, ())

    def number(self, blocks, page_index):
        return blocks[page_index] if page_index < len(blocks) else None

    def used_by_hits(self, key):
        found = self.cached.get(key, ())
        return found[0] if found else None


def make_store(cached_pages=64, max_pages=64, layout=LAYOUT, max_tokens=64):
    return PageStore(layout, SIZE, max_tokens, cached_pages, max_pages, Blocks())


def rows_for(tag, positions):
    """Rows that spell who wrote them and for which position."""
    positions = np.asarray(positions)
    ids = np.empty((len(positions), 2, 3), np.uint8)
    ids[:, 0] = tag
    ids[:, 1] = positions[:, None]
    return ids


def step_rows(*runs, status=RowStatus.RECORDED):
    """One step: each run is (request, tag, first position, position after the last)."""
    positions = np.concatenate([np.arange(a, b) for _, _, a, b in runs])
    ids = np.concatenate([rows_for(tag, np.arange(a, b)) for _, tag, a, b in runs])
    lengths = np.array([b - a for _, _, a, b in runs])
    return StepRows([r for r, *_ in runs], lengths, positions, ids, status)


def feed(store, *runs, status=RowStatus.RECORDED):
    """Store one step."""
    store.write([step_rows(*runs, status=status)])


def tags(store, request, start, stop):
    """Who wrote each row, None where it is unrecorded; positions must be right."""
    ids, status = store.read(request, start, stop)
    assert len(ids) == len(status) == stop - start
    recorded = status == RowStatus.RECORDED
    assert (ids[recorded, 1] == np.arange(start, stop)[recorded, None]).all()
    assert (ids[~recorded] == LAYOUT.fill_id).all()
    return [int(i[0, 0]) if ok else None for i, ok in zip(ids, recorded, strict=True)]


def statuses(store, request, start, stop):
    return [RowStatus(s).name for s in store.read(request, start, stop)[1]]


class History:
    """The same store, and the prefix cache that it follows, as dictionaries.

    ``rows`` holds the tag that each (request, position) must read back as, if it is recorded;
    ``content`` the tags of the KV that each block holds, None where the step's rows were lost;
    ``sure`` the (request, position) whose rows must be there though others fed them, since all
    rows of their block were published. Steps wait until rows are asked for, but for the eviction of
    a KV block, which may come before steps that are under way.
    """

    def __init__(self, cached_pages):
        self.blocks = Blocks()
        self.store = PageStore(LAYOUT, SIZE, 64, cached_pages, max(64, cached_pages), self.blocks)
        self.is_roomy = cached_pages == ROOMY
        self.began_before_reset, self.whole, self.sure = set(), set(), set()
        self.tag = self.next_block = 0
        self.waiting = []
        self.rows, self.kept, self.fed, self.family, self.content = {}, {}, {}, {}, {}

    def store_waiting(self):
        waiting, self.waiting = self.waiting, []
        if waiting:
            self.store.write(waiting)

    def admit(self, name, most_hits, keep=0):
        self.store_waiting()
        keys = [(self.family[name], index) for index in range(10)]
        found = [self.blocks.cached.get(key, ()) for key in keys[:most_hits]]
        hits = [blocks[0] for blocks in found[: [*map(bool, found), False].index(False)]]
        self.blocks.held[name] = hits
        self.fed[name] = self.kept[name] = max(keep, len(hits) * SIZE)
        self.store.resolve(self.store.admit(name, len(hits) * SIZE, keys, keep))
        self.forget(name, keep)
        for position in range(keep, len(hits) * SIZE):
            block, offset = hits[position // SIZE], position % SIZE
            self.rows[name, position] = self.content[block].get(offset)
            if block in self.whole and self.is_roomy:
                self.sure.add((name, position))
        self.began_before_reset.discard(name)
        self.fed[name] = len(hits) * SIZE

    def begin(self, name, family, most_hits):
        self.family[name] = family
        self.admit(name, most_hits)

    def step(self, names, count, *, arrives):
        self.tag = self.tag % 199 + 1
        for name in names:
            blocks = self.blocks.held[name]
            while len(blocks) * SIZE < self.fed[name] + count:
                self.next_block += 1
                self.content[self.next_block] = {}
                key = (self.family[name], len(blocks))
                blocks.append(self.next_block)
                self.blocks.cached.setdefault(key, []).append(self.next_block)
        runs = [(n, self.tag, self.fed[n], self.fed[n] + count) for n in names]
        for name, tag, start, stop in runs:
            self.fed[name] = stop
            for position in range(start, stop):
                block = self.blocks.held[name][position // SIZE]
                self.content[block][position % SIZE] = tag if arrives else None
                if position >= self.kept[name]:
                    self.rows[name, position] = tag if arrives else None
                rows = self.content[block].values()
                if len(rows) == SIZE and None not in rows and name not in self.began_before_reset:
                    self.whole.add(block)
        if arrives and runs:
            self.waiting.append(step_rows(*runs))

    def end(self, name):
        self.store_waiting()
        self.store.release(name)
        self.forget(name, 0)
        del self.fed[name]

    def forget(self, name, keep):
        self.rows = {k: v for k, v in self.rows.items() if k[0] != name or k[1] < keep}
        self.sure = {k for k in self.sure if k in self.rows}

    def evict(self, key, index):
        block = self.blocks.cached[key].pop(index)
        if not any(block in self.blocks.held[name] for name in self.fed):
            self.store.withdraw([block])

    def reset(self):
        self.store_waiting()
        self.store.start_generation()
        self.blocks.cached.clear()
        self.whole.clear()
        self.began_before_reset.update(self.fed)

    def check(self):
        self.store_waiting()
        for name in self.fed:
            for position, tag in enumerate(tags(self.store, name, 0, 40)):
                expected = self.rows.get((name, position))
                assert tag in (None, expected), (name, position, tag, expected)
                if position >= self.kept[name] or (name, position) in self.sure:
                    assert tag == expected, f"{name} lost position {position}"
