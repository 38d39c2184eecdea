"""What an engine and a server answer, for two prompts of a small model."""

import base64
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from shared_schema import RoutedExperts, RoutingLayout, encode
from shared_schema.formats import FORMATS

os.chdir(tempfile.mkdtemp())
config = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "mlp_only_layers": [0],
    "num_experts": 64,
    "num_experts_per_tok": 4,
}
Path("model").mkdir()
Path("model/config.json").write_text(json.dumps(config))
ids = np.random.default_rng(0).random((20, 3, 64)).argsort(-1)[..., :4]
sample = RoutedExperts(ids, RoutingLayout.from_hf_config(config))
array = FORMATS["npy"].write(sample)
results = [SimpleNamespace(outputs=[SimpleNamespace(routed_experts=a)]) for a in (array, None)]
text = FORMATS["vllm"].write(sample)
answer = SimpleNamespace(choices=[SimpleNamespace(routed_experts=text)])
parts = [sample, sample[8:], sample[8:]]  # of n = 3 completions of a prompt of 8 tokens
encoded = SimpleNamespace(
    choices=[
        SimpleNamespace(routed_experts=base64.b64encode(encode(part)).decode()) for part in parts
    ]
)
