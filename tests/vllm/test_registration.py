"""What the plugin changes in an engine's configuration, when, and what it leaves alone."""

import copy
import importlib.metadata
import json
import pickle
import subprocess
import sys

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.cpu_worker import CPUWorker

import vllm_r3_plugin
from vllm_r3_plugin import engine_config, options
from vllm_r3_plugin.scheduler_factory import SchedulerFactory
from vllm_r3_plugin.worker import RoutingCaptureWorker, worker_cls_over


class UsersWorker(CPUWorker):
    """A worker class that a user passes as worker_cls."""


class UsersScheduler(AsyncScheduler):
    """A scheduler class that a user passes as scheduler_cls."""


HAS_AUX = "aux_output_config" in EngineArgs.__dataclass_fields__
FLAGS = ["enable_return_routed_experts", *["aux_output_config"] * HAS_AUX]
since_0_31 = pytest.mark.skipif(not HAS_AUX, reason="before 0.31 vLLM has no --aux-output-config")

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
DENSE = {k: v for k, v in MOE.items() if "expert" not in k} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    vllm_r3_plugin.register()


@pytest.fixture
def engine_args(tmp_path):
    def make(config=MOE, **kwargs):
        (tmp_path / "config.json").write_text(json.dumps(config))
        defaults = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256}
        return EngineArgs(model=str(tmp_path), **(defaults | kwargs))

    return make


def test_vllm_finds_the_plugin_by_its_entry_point():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="moe_r3")
    assert entry.load() is vllm_r3_plugin.register


def test_registering_again_changes_nothing():
    wrapped = EngineArgs.create_engine_config
    vllm_r3_plugin.register()
    assert EngineArgs.create_engine_config is wrapped


def test_register_does_not_raise_when_it_cannot_install(monkeypatch, caplog):
    def fail():
        raise RuntimeError("no seam today")

    monkeypatch.setattr(engine_config, "install", fail)
    vllm_r3_plugin.register()
    assert "no seam today" in caplog.text


def test_where_it_cannot_install_vllm_treats_the_flag_as_it_does_by_itself(engine_args, tmp_path):
    engine_args()
    code = f"""
import vllm_r3_plugin.engine_config as engine_config
def install():
    raise RuntimeError("no seam today")
engine_config.install = install
from vllm.engine.arg_utils import EngineArgs
given = dict(model={str(tmp_path)!r}, skip_tokenizer_init=True, enforce_eager=True)
config = EngineArgs(**given).create_engine_config()
assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
EngineArgs(enable_return_routed_experts=True, **given).create_engine_config()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    said = done.stdout + done.stderr
    assert said.count("moe-r3 is not active") == 1
    assert "RuntimeError: no seam today" in said
    if HAS_AUX:
        assert "AuxOutput Connector requires Model Runner V2" in "".join(said.splitlines()[-2:])
    else:  # 0.30 routes by itself with this runner
        assert done.returncode == 0, said


def test_with_the_flag_off_the_configuration_is_vllms_own(engine_args):
    config = engine_args().create_engine_config()
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None
    assert config.additional_config == {}


def test_with_the_flag_off_no_class_of_the_engine_is_touched():
    code = """
from vllm.engine.arg_utils import EngineArgs
import vllm_r3_plugin; vllm_r3_plugin.register()
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
classes = (EngineCore, EngineCoreProc, AsyncLLM, InputProcessor, LLMEngine, OutputProcessor,
           RequestState)
touched = [name for cls in classes
           for name, value in vars(cls).items() if hasattr(value, "moe_r3_original")]
assert touched == [] and not hasattr(EngineCore, "moe_r3_abort"), touched
assert hasattr(EngineArgs.create_engine_config, "moe_r3_original")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    "given",
    [
        {"enable_return_routed_experts": True},
        pytest.param(
            {"aux_output_config": {"enable_return_routed_experts": True}}, marks=since_0_31
        ),
    ],
)
def test_either_form_of_the_flag_is_taken_over_and_the_arguments_look_untouched(engine_args, given):
    args = engine_args(**given)
    before = copy.deepcopy([getattr(args, name) for name in FLAGS])
    config = args.create_engine_config()
    assert [getattr(args, name) for name in FLAGS] == before
    own = config.aux_output_config if HAS_AUX else config.model_config
    assert not own.enable_return_routed_experts
    assert args.additional_config == {}
    assert isinstance(config.scheduler_config.scheduler_cls, SchedulerFactory)


def test_the_worker_extends_the_platforms_own_and_is_found_by_name(engine_args):
    config = engine_args(enable_return_routed_experts=True).create_engine_config()
    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    assert issubclass(worker, RoutingCaptureWorker)
    assert issubclass(worker, CPUWorker)
    assert resolve_obj_by_qualname(config.parallel_config.worker_cls) is worker


def test_a_users_worker_and_scheduler_are_extended(engine_args):
    config = engine_args(
        enable_return_routed_experts=True,
        worker_cls=f"{__name__}.UsersWorker",
        scheduler_cls=UsersScheduler,
    ).create_engine_config()
    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    assert issubclass(worker, UsersWorker)
    assert config.scheduler_config.scheduler_cls.users_class is UsersScheduler


@pytest.mark.parametrize(("asynchronous", "expected"), [(True, AsyncScheduler), (False, Scheduler)])
def test_sync_or_async_is_decided_when_the_scheduler_is_built(engine_args, asynchronous, expected):
    config = engine_args(enable_return_routed_experts=True).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    factory = pickle.loads(pickle.dumps(config.scheduler_config.scheduler_cls))
    assert factory.base(config) is expected


def test_the_configuration_prepares_a_process_that_did_not_load_the_plugin():
    code = f"""
import pickle
factory = pickle.loads({pickle.dumps(SchedulerFactory())!r})
from vllm.v1.engine.core import EngineCore
assert hasattr(EngineCore._initialize_kv_caches, "moe_r3_original")
from vllm.v1.metrics.loggers import StatLoggerManager
assert hasattr(StatLoggerManager.record, "moe_r3_original")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_graphs_with_capture_have_a_hash_of_their_own(engine_args):
    off = engine_args().create_engine_config()
    on = engine_args(enable_return_routed_experts=True).create_engine_config()
    assert on.compute_hash() != off.compute_hash()


def test_options_and_other_additional_config_reach_every_process(engine_args):
    given = {"r3": {"max_bytes": 1 << 20}, "mine": 1}
    args = engine_args(enable_return_routed_experts=True, additional_config=given)
    config = args.create_engine_config()
    assert given == {"r3": {"max_bytes": 1 << 20}, "mine": 1}
    assert config.additional_config["mine"] == 1
    assert options.R3Options.of(config).max_bytes == 1 << 20


@since_0_31
def test_vllms_own_memory_limit_is_honoured(engine_args):
    aux = {"enable_return_routed_experts": True, "max_bytes": 4096}
    config = engine_args(aux_output_config=aux).create_engine_config()
    assert options.R3Options.of(config).max_bytes == 4096


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"maxbytes": 1}, "unknown key 'maxbytes'"),
        ({"max_bytes": "1G"}, "'1G'"),
        ({"max_bytes": 0}, "is 0"),
        ({"backend": "native"}, "backend in .* is 'native', expected 'r3' or 'vllm'"),
        ({"routing": True}, "routing in .* is True, expected 'on' or 'off'"),
        ({"encoding": "npy"}, "encoding in .* is 'npy', expected 'native' or 'r3'"),
        ({"delivery": "later"}, "delivery in .* is 'later'"),
        ({"unrecorded": "zeros"}, "unrecorded in .* is 'zeros'"),
        ({"fetch_max_bytes": None}, "fetch_max_bytes in .* is None"),
        ({"fetch_ttl_s": "60"}, "fetch_ttl_s in .* is '60'"),
        ({"fetch_ttl_s": 0}, "fetch_ttl_s in .* is 0"),
        (3, "is 3"),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(engine_args, given, said):
    args = engine_args(enable_return_routed_experts=True, additional_config={"r3": given})
    with pytest.raises(ValueError, match=said) as error:
        args.create_engine_config()
    assert_one_sentence(error)


def test_the_backend_vllm_leaves_vllms_own_path_and_its_errors(engine_args):
    args = engine_args(
        enable_return_routed_experts=True, additional_config={"r3": {"backend": "vllm"}}
    )
    if HAS_AUX:
        with pytest.raises(ValueError, match="requires Model Runner V2"):
            args.create_engine_config()
    else:
        config = args.create_engine_config()
        assert config.model_config.enable_return_routed_experts
        assert config.scheduler_config.scheduler_cls is None


def test_a_dense_model_is_refused_in_one_clear_sentence(engine_args):
    args = engine_args(DENSE, enable_return_routed_experts=True)
    with pytest.raises(ValueError, match="which has no experts") as error:
        args.create_engine_config()
    assert_one_sentence(error)


def test_a_dense_model_without_the_flag_is_served(engine_args):
    assert engine_args(DENSE).create_engine_config().model_config.is_moe is False


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {
                "tensor_parallel_size": 2,
                "decode_context_parallel_size": 2,
                "hf_overrides": {"num_key_value_heads": 1},
            },
            "decode_context_parallel_size 2",
        ),
    ],
)
def test_what_cannot_be_captured_yet_is_refused_by_name(engine_args, given, said):
    args = engine_args(enable_return_routed_experts=True, **given)
    with pytest.raises(ValueError, match=said) as error:
        args.create_engine_config()
    assert_one_sentence(error)


def test_a_node_with_another_version_is_named():
    with pytest.raises(ValueError, match=r"host node7 has moe-r3 0\.0\.1, expected 9\.9"):
        options.R3Options(version="9.9").require_version("0.0.1", "node7")


def test_a_name_that_is_no_worker_class_is_an_ordinary_attribute_error():
    import vllm_r3_plugin.worker as module

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = module.no_such_thing
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        resolve_obj_by_qualname(worker_cls_over("no_such_package.Worker"))


def assert_one_sentence(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "expected" in message
