import inspect

import megatron.core
import pytest

from megatron_r3.seams import SEAMS, Seam, resolve

KNOWN = {version for seam in SEAMS for version in seam.versions}


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.symbol)
def test_the_installed_megatron_core_has(seam: Seam) -> None:
    # megatron-core appends the commit of whatever git checkout it runs in.
    installed = megatron.core.__version__.partition("+")[0]
    if installed in KNOWN and installed not in seam.versions:
        pytest.skip(f"{installed} is known not to have it")
    symbol = resolve(seam.symbol)
    if seam.parameters:
        assert set(seam.parameters) <= set(inspect.signature(symbol).parameters)


def test_a_symbol_that_moved_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"has no megatron\.core\.utils:gone"):
        resolve("megatron.core.utils:gone")
