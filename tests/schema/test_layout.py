"""Layouts: what they refuse, and that each architecture's rule is the model's own."""

import dataclasses

import pytest

from shared_schema import RoutingLayout, RoutingSchemaError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 0, "num_experts is 0"),
        ("num_experts", 65_536, "at most 65535"),
        ("num_experts", True, "num_experts is True"),
        ("top_k", 9, "top_k is 9 with num_experts 8"),
        ("top_k", 2.0, "top_k is 2.0"),
        ("moe_layers", (), "dense model"),
        ("moe_layers", (1, 1), "ascending, distinct"),
        ("moe_layers", (2, 1), "ascending, distinct"),
        ("moe_layers", (-1, 1), "ascending, distinct"),
        ("moe_layers", (1, 4), "below num_hidden_layers 4"),
        ("moe_layers", "ab", "moe_layers is 'ab'"),
        ("num_hidden_layers", None, "num_hidden_layers is None"),
    ],
)
def test_a_contradictory_layout_cannot_exist(field, value, message):
    good = RoutingLayout(8, 2, (1, 3), 4)
    with pytest.raises(RoutingSchemaError, match=message):
        dataclasses.replace(good, **{field: value})


@pytest.mark.parametrize(
    ("experts", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_535, "uint16")]
)
def test_the_dtype_is_the_narrowest_that_holds_every_id(experts, dtype):
    assert RoutingLayout(experts, 1, (0,), 1).dtype == dtype


def test_a_layout_survives_json():
    layout = RoutingLayout(8, 2, (1, 3), 4)
    assert RoutingLayout.from_dict(layout.to_dict() | {"later": 1}) == layout
    with pytest.raises(RoutingSchemaError, match="lacks top_k"):
        RoutingLayout.from_dict({"num_experts": 8, "moe_layers": [0], "num_hidden_layers": 1})


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
ARCHITECTURES = {
    "qwen3_moe every second layer, one forced dense": (
        "qwen3_moe",
        {"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3_moe first dense": ("qwen3_moe", {"num_experts": 8, "mlp_only_layers": [0]}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 8}),
    "deepseek_v2": ("deepseek_v2", {"n_routed_experts": 8, "first_k_dense_replace": 1, **LATENT}),
    "deepseek_v3": ("deepseek_v3", {"n_routed_experts": 8, "first_k_dense_replace": 3, **LATENT}),
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "olmoe": ("olmoe", {"num_experts": 8}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 8}),
    "glm4_moe": ("glm4_moe", {"n_routed_experts": 8, "first_k_dense_replace": 2}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_rule_of_each_architecture_is_the_models_own(name):
    """The oracle is the model that transformers builds: a layer is MoE if it holds experts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type, fields = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | fields))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    built = tuple(
        i
        for i, layer in enumerate(model.model.layers)
        if any(n.rsplit(".", 1)[-1] == "experts" for n, _ in layer.named_modules())
    )
    assert len(built) > 0
    for source in (config, config.to_dict()):
        layout = RoutingLayout.from_hf_config(source)
        assert layout == RoutingLayout(8, 2, built, 6)


def test_deepseeks_moe_layer_freq_counts_from_layer_zero():
    config = {
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 2,
    }
    assert RoutingLayout.from_hf_config(config).moe_layers == (4, 6)


def test_a_multimodal_config_is_read_through_its_text_config():
    text = {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    }
    config = {"model_type": "some_vl", "text_config": text}
    assert RoutingLayout.from_hf_config(config) == RoutingLayout(8, 2, (0, 1), 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected one of"),
        ({"model_type": "mixtral"}, "dense model"),
        ({"model_type": "olmoe", "num_experts": 8}, "no num_hidden_layers"),
        (
            {"model_type": "olmoe", "num_experts": 8, "num_hidden_layers": 2},
            "no num_experts_per_tok",
        ),
        ({"model_type": ["olmoe"]}, "model_type is \\['olmoe'\\]"),
        ({"model_type": "olmoe", "num_experts": 8, "num_hidden_layers": 10**30}, "expected 1 … "),
        ({"model_type": "olmoe", "num_experts": 8, "num_hidden_layers": "2"}, "expected 1 … "),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 8,
                "num_hidden_layers": 2,
                "decoder_sparse_step": "2",
            },
            "does not say which layers have experts",
        ),
    ],
)
def test_a_config_that_does_not_say_enough_is_refused_by_name(config, message):
    with pytest.raises(RoutingSchemaError, match=message):
        RoutingLayout.from_hf_config(config)


def _megatron(**fields):
    return {"num_moe_experts": 8, "moe_router_topk": 2, "num_layers": 4} | fields


@pytest.mark.parametrize(
    ("frequency", "layers"),
    [(1, (0, 1, 2, 3)), (2, (0, 2)), ([0, 1, 1, 0], (1, 2))],
)
def test_megatrons_moe_layer_freq_is_read_as_megatron_reads_it(frequency, layers):
    layout = RoutingLayout.from_megatron_config(_megatron(moe_layer_freq=frequency))
    assert layout == RoutingLayout(8, 2, layers, 4)


@pytest.mark.parametrize("frequency", [0, [1, 1], [1, 2, 0, 0], "1"])
def test_a_malformed_moe_layer_freq_is_refused(frequency):
    with pytest.raises(RoutingSchemaError, match="moe_layer_freq is"):
        RoutingLayout.from_megatron_config(_megatron(moe_layer_freq=frequency))


def test_a_dense_megatron_config_is_refused():
    with pytest.raises(RoutingSchemaError, match="dense model"):
        RoutingLayout.from_megatron_config(_megatron(num_moe_experts=None))
