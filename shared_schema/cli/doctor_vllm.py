"""Whether the installed vLLM loads the plugin, and would start a model with routing captured."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from shared_schema.cli.checks import Check, sentence_of

_GROUP, _PLUGIN = "vllm.general_plugins", "moe_r3"


class EngineSizes(NamedTuple):
    """What decides how much memory capture needs; ``max_bytes`` is the plugin's option."""

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    max_model_len: int = 32_768
    max_bytes: int | None = None


def check_vllm(
    config: dict[str, Any] | None, engine_arguments: list[str]
) -> tuple[list[Check], EngineSizes | None]:
    """Check vLLM, and with a model's ``config`` the engine that `vllm serve` would start.

    Returns:
        the checks, and the engine's sizes if there would be one.

    """
    try:
        import vllm
    except ImportError as error:
        return [_not_importable(error)], None
    except Exception as error:
        return [_broken(error)], None
    checks = [_check_version(vllm.__version__), *_check_seams(), *_check_plugin()]
    if config is None or any(check.status == "error" for check in checks):
        return checks, None
    engine, sizes = _check_engine(config, engine_arguments)
    return [*checks, engine], sizes


def _not_importable(error: ImportError) -> Check:
    if getattr(error, "name", None) == "vllm":
        return Check(
            "vllm",
            "warning",
            "not installed: routing cannot be captured here",
            "pip install 'moe-r3[vllm]' where the rollout runs",
        )
    return _broken(error)


def _broken(error: Exception) -> Check:
    return Check(
        "vllm",
        "error",
        f"cannot be imported: {type(error).__name__}: {sentence_of(error)}",
        "mend the installation until python -c 'import vllm' works",
    )


def _check_version(found: str) -> Check:
    from vllm_r3_plugin import seam_check, seams

    release = seam_check.release_of(found)
    if release in seams.EXECUTED_ON:
        return Check("vllm", "ok", found)
    known = ", only its sources were read" if release in seams.READ_ON else ""
    return Check(
        "vllm",
        "warning",
        f"this moe-r3 never ran on {found}{known}",
        f"install vLLM {seam_check.releases_named(seams.EXECUTED_ON)}, or run this project's "
        f"tests on {found}",
    )


def _check_seams() -> Iterator[Check]:
    from vllm_r3_plugin import seam_check, seams

    missing = seam_check.missing()
    for seam in missing:
        yield Check(
            "vllm-seams",
            "error",
            f"vLLM has no {seam.symbol}, or not all of it, which serves: {seam.why}",
            f"install vLLM {seam_check.releases_named(seams.EXECUTED_ON)}",
        )
    if not missing:
        release = seam_check.installed_release()
        touched = sum(seam.applies_to(release) for seam in seams.SEAMS)
        yield Check("vllm-seams", "ok", f"all {touched} symbols that moe-r3 touches exist")


def _check_plugin() -> Iterator[Check]:
    found = list(entry_points(group=_GROUP, name=_PLUGIN))
    if not found:
        yield Check(
            "plugin",
            "error",
            f"no installed package has the entry point {_PLUGIN} of {_GROUP}",
            "pip install moe-r3 in this environment",
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _PLUGIN not in allowed.split(","):
        yield Check(
            "plugin",
            "error",
            f"VLLM_PLUGINS is {allowed!r}, which keeps vLLM from loading {_PLUGIN}",
            f"unset it, or add {_PLUGIN}",
        )
        return
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins

        from vllm_r3_plugin.wrapping import is_wrapped

        load_general_plugins()
        taken_over = is_wrapped(EngineArgs, "create_engine_config")
    except Exception as error:
        yield _broken(error)
        return
    if taken_over:
        yield Check("plugin", "ok", "vLLM loaded it, --enable-return-routed-experts is taken over")
    else:
        yield Check(
            "plugin",
            "error",
            "vLLM loaded it, yet --enable-return-routed-experts is not taken over",
            "see vLLM's log for the warning 'moe-r3 is not active'",
        )


def _check_engine(config: dict[str, Any], arguments: list[str]) -> tuple[Check, EngineSizes | None]:
    """Let vLLM configure the engine, as `vllm serve` does, without starting it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            engine, others = _configured(folder, arguments)
            ignored = f"; not looked at: {' '.join(others)}" if others else ""
            return (
                Check("engine", "ok", f"vLLM would capture, with {_describe(engine)}{ignored}"),
                _sizes(engine),
            )
        except (Exception, SystemExit) as error:
            return _refused(error, folder), None


def _configured(folder: str, arguments: list[str]) -> tuple[Any, list[str]]:
    """The engine's configuration, and arguments that are not the engine's."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise ValueError(message)

    parser = AsyncEngineArgs.add_cli_args(Parser())
    parsed, others = parser.parse_known_args(
        ["--enable-return-routed-experts", "--skip-tokenizer-init", *arguments]
    )
    parsed.model = folder
    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config(), others


def _sizes(engine: Any) -> EngineSizes:
    from vllm_r3_plugin.options import R3Options

    return EngineSizes(
        engine.scheduler_config.max_num_batched_tokens,
        engine.scheduler_config.max_num_seqs,
        engine.model_config.max_model_len,
        R3Options.of(engine).max_bytes,
    )


def _refused(error: BaseException, folder: str) -> Check:
    return Check(
        "engine",
        "error",
        f"vLLM would not start: {sentence_of(error).replace(folder, 'the model')}",
        "change the arguments behind --, or serve without --enable-return-routed-experts",
    )


def _describe(engine: Any) -> str:
    worker = engine.parallel_config.worker_cls.rpartition(":")[2]
    scheduling = "asynchronous" if engine.scheduler_config.async_scheduling else "synchronous"
    return f"{worker} and {scheduling} scheduling; kernels are checked when the model is loaded"
