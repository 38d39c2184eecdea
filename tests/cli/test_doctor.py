"""`r3 doctor` on the real vLLM and megatron-core, and where they are missing or wrong."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared_schema.cli import doctor_megatron, doctor_vllm
from shared_schema.cli.doctor_model import check_model
from shared_schema.cli.doctor_vllm import EngineSizes

from .conftest import CONFIG

ROOT = Path(__file__).parents[2]
DENSE = {k: v for k, v in CONFIG.items() if "expert" not in k} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}
ABSENT = "raise ModuleNotFoundError(name={!r})\n"


def doctor(*arguments, before=""):
    """`r3 doctor --json` in a process of its own; ``before`` hides packages."""
    done = subprocess.run(
        [sys.executable, "-m", "shared_schema.cli", "doctor", "--json", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [before, *sys.path]))},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, {c["name"]: c for c in json.loads(done.stdout)["checks"]}


def by_name(checks):
    return {check.name: check for check in checks}


def test_this_installation_is_well_and_would_capture_a_small_model(folder, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    status, checks = doctor("--model", folder, "--", "--max-num-batched-tokens", "512")
    assert {name: c["status"] for name, c in checks.items()} == dict.fromkeys(
        (
            "moe-r3",
            "torch",
            "vllm",
            "vllm-seams",
            "plugin",
            "engine",
            "megatron",
            "megatron-seams",
            "megatron-routers",
            "model",
            "memory-worker",
            "memory-engine-core",
            "memory-trainer",
        ),
        "ok",
    )
    assert status == 0
    assert checks["vllm"]["message"] == importlib.metadata.version("vllm").partition("+")[0]
    assert "CPUWorker" in checks["engine"]["message"]
    # 512 tokens of 3 layers and 4 ids of one byte.
    assert checks["memory-worker"]["message"].startswith("6.1 kB of device memory on each rank")


def test_absent_frameworks_are_warnings_with_what_to_install(tmp_path):
    for name in ("vllm", "megatron"):
        (tmp_path / f"{name}.py").write_text(ABSENT.format(name))
    status, checks = doctor(before=str(tmp_path))
    assert status == 0, checks
    for name in ("vllm", "megatron"):
        assert checks[name]["status"] == "warning"
        assert checks[name]["fix"].startswith(f"pip install 'moe-r3[{name}]'")
    assert "plugin" not in checks


def test_a_framework_that_dies_when_imported_is_an_error(tmp_path):
    (tmp_path / "vllm.py").write_text("import os\nos._exit(9)\n")
    (tmp_path / "megatron.py").write_text("raise RuntimeError('built for another torch')\n")
    status, checks = doctor(before=str(tmp_path))
    assert status == 1
    assert checks["vllm"]["status"] == "error"
    assert "died" in checks["vllm"]["message"]
    assert checks["megatron"]["status"] == "error"
    assert "built for another torch" in checks["megatron"]["message"]


@pytest.mark.parametrize(("value", "status"), [("lora", "error"), ("lora,moe_r3", "ok")])
def test_a_plugin_that_vllm_is_told_not_to_load_is_an_error(monkeypatch, value, status):
    monkeypatch.setenv("VLLM_PLUGINS", value)
    (check,) = doctor_vllm._check_plugin()
    assert check.status == status
    assert (value in check.message) == (status == "error")


def test_a_plugin_without_entry_point_is_an_error(monkeypatch):
    monkeypatch.setattr(doctor_vllm, "_PLUGIN", "moe_r3_elsewhere")
    (check,) = doctor_vllm._check_plugin()
    assert check.status == "error"
    assert "moe_r3_elsewhere" in check.message


def test_a_symbol_that_vllm_lost_is_an_error_that_names_it(monkeypatch):
    from vllm_r3_plugin import seams

    gone = seams.Seam("vllm.v1.request:Request.gone", "read", "a reason", "never")
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, gone))
    monkeypatch.setattr(seams, "EXECUTED_ON", ((0, 1),))
    checks, sizes = doctor_vllm.check_vllm(CONFIG, [])
    found = by_name(checks)
    assert sizes is None
    assert found["vllm"].status == "warning"
    assert found["vllm"].fix.startswith("install vLLM 0.1,")
    assert found["vllm-seams"].status == "error"
    assert "vllm.v1.request:Request.gone" in found["vllm-seams"].message
    assert "a reason" in found["vllm-seams"].message
    assert "engine" not in found


@pytest.mark.parametrize(
    "moved", ["utils.argparse_utils.FlexibleArgumentParser", "plugins.load_general_plugins"]
)
def test_what_a_later_vllm_moved_is_an_error_and_no_traceback(monkeypatch, moved):
    monkeypatch.delattr(f"vllm.{moved}")
    checks, sizes = doctor_vllm.check_vllm(CONFIG, [])
    (error,) = [check for check in checks if check.status == "error"]
    assert sizes is None
    assert f"cannot import name '{moved.rpartition('.')[2]}'" in error.message


@pytest.mark.parametrize(
    ("found", "status", "says"),
    [
        ("0.32.0+cpu", "ok", "0.32.0+cpu"),
        ("0.33.1", "warning", "never ran on 0.33.1, only its sources were read"),
        ("0.99.0rc1", "warning", "never ran on 0.99.0rc1"),
    ],
)
def test_a_release_of_vllm_that_moe_r3_never_ran_on_is_a_warning(found, status, says):
    check = doctor_vllm._check_version(found)
    assert check.status == status
    assert check.message.endswith(says)


def test_a_symbol_that_megatron_lost_is_an_error_that_names_it(monkeypatch):
    from megatron_r3 import seams

    def seam(symbol, parameters=()):
        return seams.Seam(symbol, "called", "a reason", seams.BOTH, "never", parameters)

    gone = seam("megatron.core.utils:gone")
    on_cpu = seam("megatron.core.utils:gone_on_cpu")
    other = seam("megatron.core.utils:divide", ("no_such_parameter",))
    monkeypatch.setattr(seams, "SEAMS", (gone, on_cpu, other))
    monkeypatch.setattr(seams, "CPU_SEAMS", (on_cpu,))
    _, *found, _ = doctor_megatron.check_megatron()
    assert [(c.name, c.status) for c in found] == [
        ("megatron-seams", "error"),
        ("megatron-seams", "warning"),
        ("megatron-seams", "error"),
    ]
    assert "megatron.core.utils:gone" in found[0].message
    assert "only where there is no CUDA" in found[1].message
    assert "divide takes no no_such_parameter" in found[2].message


@pytest.mark.parametrize(("installed", "status"), [("0.19.2+62f39ab", "ok"), ("0.18.0", "warning")])
def test_a_megatron_that_was_never_tested_is_a_warning(monkeypatch, installed, status):
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", installed)
    assert by_name(doctor_megatron.check_megatron())["megatron"].status == status


@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        (DENSE, [], "no experts"),
        (CONFIG, ["--max-model-len", "many"], "--max-model-len"),
        (CONFIG, ["--help"], "would not start"),
        (CONFIG, ["--additional-config", '{"r3": {"max_bytes": 0}}'], "max_bytes"),
    ],
)
def test_an_engine_that_would_not_start_says_why(monkeypatch, config, arguments, says):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    checks, sizes = doctor_vllm.check_vllm(config, arguments)
    engine = by_name(checks)["engine"]
    assert sizes is None
    assert engine.status == "error"
    assert says in engine.message


def test_the_memory_is_that_of_the_buffers():
    found = by_name(check_model(CONFIG, EngineSizes(1000, 8, 500), 10_000, 4000))
    row = 3 * 4
    assert found["memory-worker"].message.startswith(f"{row}.0 kB of device memory")
    core = found["memory-engine-core"]
    assert core.message.startswith(f"{10 * row}.0 kB for the 10,000 tokens of the KV cache")
    assert f"up to {14 * row}.0 kB of host memory if 8 requests of 500 tokens" in core.message
    assert found["memory-trainer"].message.startswith(f"{4 * row}.0 kB of device memory")


@pytest.mark.parametrize(("max_bytes", "status"), [(120_000, "ok"), (119_999, "warning")])
def test_a_store_too_small_for_the_kv_cache_is_a_warning(max_bytes, status):
    sizes = EngineSizes(1000, 8, 500, max_bytes)
    core = by_name(check_model(CONFIG, sizes, 10_000, 4000))["memory-engine-core"]
    assert core.status == status
    assert (core.fix == "set max_bytes to 120000 or more") == (status == "warning")


@pytest.mark.parametrize(
    ("config", "status"),
    [
        (DENSE, "error"),
        ({"model_type": "new_moe", "num_experts": 8}, "warning"),
        ({"model_type": "new_vl", "text_config": {"num_experts": 8}}, "warning"),
        ({"model_type": "new_vl", "text_config": ["experts"]}, "error"),
        ({}, "error"),
    ],
)
def test_an_unknown_architecture_is_a_warning_and_a_dense_model_an_error(config, status):
    (check,) = check_model(config, None, 1, 1)
    assert check.status == status
    assert check.fix
