"""The files that the page looks at: one rollout of 40 rows, and what can go wrong with it."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from shared_schema import RoutedExperts, RoutingLayout, RowStatus, Span, encode, to_vllm_native

os.chdir(tempfile.mkdtemp())
Path("model").mkdir()
Path("model/config.json").write_text(
    json.dumps(
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 4,
            "mlp_only_layers": [0],
            "num_experts": 64,
            "num_experts_per_tok": 4,
        }
    )
)
layout = RoutingLayout(64, 4, (1, 2, 3), 4)
rng = np.random.default_rng(0)
ids = rng.random((40, 3, 64)).argsort(-1)[..., :4]
rollout = RoutedExperts(ids, layout)
flipped = ids.copy()
flipped[[4, 17, 31], [0, 2, 1]] = ids[[5, 18, 32], [0, 2, 1]]
status = np.zeros(40, np.uint8)
status[12:15] = RowStatus.STEP_LOST
moved = np.roll(to_vllm_native(rollout), -1, axis=1)

for name, routed in {
    "rollout": rollout,
    "trainer": RoutedExperts(flipped, layout),
    "shifted": RoutedExperts(ids[1:], layout),
    "moved": RoutedExperts(np.roll(ids, -1, axis=1), layout),
    "doubled": RoutedExperts(np.concatenate([ids[:10], ids]), layout),
    "stuck": RoutedExperts(ids.repeat(2, axis=0)[:40], layout),
    "gaps": RoutedExperts(ids, layout, 0, status, (Span(0, 40, weight_version="7"),)),
}.items():
    Path(f"{name}.safetensors").write_bytes(encode(routed))
np.save("zeros.npy", np.zeros((40, 4, 4), np.uint8))
np.save("moved.npy", moved)
