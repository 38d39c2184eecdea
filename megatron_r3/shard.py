"""Which rows of the token axis one rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Int32

from megatron_r3.errors import RowCountError

Integers: TypeAlias = Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shard:
    """The part of the token axis that one rank holds.

    Context parallelism cuts first, each sequence by itself; sequence parallelism cuts what is left
    on a rank into consecutive runs.

    Attributes:
        cp_size: context-parallel ranks.
        cp_rank: this rank among them.
        sp_size: tensor-parallel ranks that split the token axis (sequence parallelism), else 1.
        sp_rank: this rank among them.
        cp_order: ``"zigzag"``: of ``2 * cp_size`` chunks of a sequence a rank holds ``cp_rank`` and
            its mirror ``2 * cp_size - 1 - cp_rank``, as Megatron's ``get_batch_on_this_cp_rank``
            cuts; ``"contiguous"``: of ``cp_size`` chunks it holds ``cp_rank``.

    Raises:
        RowCountError: a rank that is not below its size, or another order.

    """

    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    sp_rank: int = 0
    cp_order: Literal["zigzag", "contiguous"] = "zigzag"

    def __post_init__(self) -> None:
        for axis, rank, size in (
            ("cp", self.cp_rank, self.cp_size),
            ("sp", self.sp_rank, self.sp_size),
        ):
            if not 0 <= rank < size:
                raise RowCountError(
                    f"{axis}_rank is {rank} of {axis}_size {size}, expected 0 … {axis}_size - 1: "
                    "take both from the same group."
                )
        if self.cp_order not in ("zigzag", "contiguous"):
            raise RowCountError(
                f"cp_order is {self.cp_order!r}, expected 'zigzag' or 'contiguous': name one."
            )

    def rows(
        self, sequences: Integers, padding: int = 0
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Sequence and offset in it of each row that this rank holds, in its order.

        Args:
            sequences: rows of each sequence, all of which stand one after the other.
            padding: rows behind the last sequence; they count as one more sequence.

        Raises:
            RowCountError: rows that the ranks cannot share evenly.

        """
        sizes = np.asarray(sequences, np.int64)
        zigzag = self.cp_order == "zigzag" and self.cp_size > 1
        parts = (1 + zigzag) * self.cp_size
        if bool((sizes % parts).any()) or padding % self.cp_size:
            raise RowCountError(
                f"sequences take {sizes.tolist()} rows and {padding} behind them, expected "
                f"multiples of {parts} for {self.cp_size} context-parallel ranks "
                f"({self.cp_order}): pad each sequence."
            )
        chunk = sizes // parts
        owner, start = np.arange(len(sizes)), self.cp_rank * chunk
        if zigzag:
            start = np.stack([start, (parts - 1 - self.cp_rank) * chunk], 1).reshape(-1)
            owner, chunk = np.repeat(owner, 2), np.repeat(chunk, 2)
        owner, start = np.append(owner, len(sizes)), np.append(start, 0)
        chunk = np.append(chunk, padding // self.cp_size)
        ends = np.cumsum(chunk)
        total = int(ends[-1])
        if total % self.sp_size:
            raise RowCountError(
                f"the token axis has {total} columns, expected a multiple of {self.sp_size}, the "
                "ranks of sequence parallelism: pad the batch."
            )
        first = self.sp_rank * (total // self.sp_size)
        last = first + total // self.sp_size
        held = np.clip(ends, first, last) - np.clip(ends - chunk, first, last)
        # In place from here on: what is as long as the rows should be allocated once.
        offset = np.repeat((start - (ends - chunk)).astype(np.int32), held)
        offset += np.arange(first, last, dtype=np.int32)
        return np.repeat(owner.astype(np.int32), held), offset


WHOLE = Shard()
