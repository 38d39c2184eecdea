"""Whether the installed megatron-core is one that ``megatron_r3`` can replay in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from shared_schema.cli.checks import Check, sentence_of


def check_megatron() -> list[Check]:
    """Check megatron-core and what of it is touched."""
    try:
        import megatron.core
    except ImportError as error:
        return [_not_importable(error)]
    except Exception as error:
        return [_broken(error)]
    # megatron-core appends the commit of whatever git checkout it runs in.
    installed = megatron.core.__version__.partition("+")[0]
    return [*_check_seams(installed), _refusals()]


def _refusals() -> Check:
    from megatron_r3.refusals import REFUSALS

    names = ", ".join(refusal.name for refusal in REFUSALS)
    return Check(
        "megatron-routers",
        "ok",
        f"every TopKRouter replays, but for those that attach() refuses by name: {names}",
    )


def _not_importable(error: ImportError) -> Check:
    if getattr(error, "name", None) in ("megatron", "megatron.core"):
        return Check(
            "megatron",
            "warning",
            "megatron-core is not installed: routing cannot be replayed here",
            "pip install 'moe-r3[megatron]' where the trainer runs",
        )
    return _broken(error)


def _broken(error: Exception) -> Check:
    return Check(
        "megatron",
        "error",
        f"megatron-core cannot be imported: {type(error).__name__}: {sentence_of(error)}",
        "mend the installation until python -c 'import megatron.core' works",
    )


def _check_seams(installed: str) -> Iterator[Check]:
    from megatron_r3.seams import CPU_SEAMS, SEAMS, resolve

    checked = sorted({version for seam in SEAMS for version in seam.versions})
    if installed in checked:
        yield Check("megatron", "ok", f"megatron-core {installed}")
    else:
        yield Check(
            "megatron",
            "warning",
            f"megatron-core {installed} was never tested with this moe-r3",
            f"install {' or '.join(checked)}, or run this project's tests on {installed}",
        )
    expected = [s for s in SEAMS if installed not in checked or installed in s.versions]
    missing = 0
    for seam in expected:
        try:
            symbol = resolve(seam.symbol)
            lacking = set(seam.parameters) - set(inspect.signature(symbol).parameters)
            problem = f"{seam.symbol} takes no {', '.join(sorted(lacking))}" if lacking else ""
        except RuntimeError as error:
            problem = sentence_of(error)
        except (TypeError, ValueError):
            problem = ""  # has no signature, and needs none
        if problem:
            missing += 1
            yield Check(
                "megatron-seams",
                "warning" if seam in CPU_SEAMS else "error",
                f"{problem}; it serves: {seam.why}"
                + (" (only where there is no CUDA)" if seam in CPU_SEAMS else ""),
                f"install megatron-core {' or '.join(checked)}",
            )
    if not missing:
        yield Check(
            "megatron-seams", "ok", f"all {len(expected)} symbols that moe-r3 touches exist"
        )
