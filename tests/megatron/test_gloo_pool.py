import os
import time

import pytest
import torch

from tests.megatron.gloo_pool import GlooPool


def sum_of_ranks(factor: int) -> float:
    total = torch.tensor(float(factor * torch.distributed.get_rank()))
    torch.distributed.all_reduce(total)
    return total.item()


def raise_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("lost")


def die_on_rank_one_while_the_other_waits() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(1)
    time.sleep(60)


def wait_for_nothing() -> None:
    time.sleep(60)


def test_an_exception_names_its_rank_and_spares_the_pool(gloo_2: GlooPool) -> None:
    with pytest.raises(RuntimeError, match=r"^\nrank 1 of 2: Traceback(.|\n)+KeyError: 'lost'\n$"):
        gloo_2.run(raise_on_rank_one)
    assert gloo_2.run(sum_of_ranks, 3) == [3.0, 3.0]


def test_a_dead_or_hanging_rank_is_named_and_the_next_run_works(gloo_2: GlooPool) -> None:
    with pytest.raises(RuntimeError, match=r"^\nrank 1 of 2: the process died$"):
        gloo_2.run(die_on_rank_one_while_the_other_waits)
    assert gloo_2.run(sum_of_ranks, 1) == [1.0, 1.0]
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not end wait_for_nothing"):
        gloo_2.run(wait_for_nothing, timeout_s=1)
