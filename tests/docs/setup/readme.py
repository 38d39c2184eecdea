import numpy as np

from shared_schema import RoutedExperts, RoutingLayout, encode
from tests.docs.small_megatron import (  # noqa: F401
    build_model,
    forward_backward_func,
    loss_function,
    start,
)

start()
model_chunks = build_model()
settings: dict[str, object] = {}

ids = np.random.default_rng(0).random((20, 3, 64)).argsort(-1)[..., :4]
sample = RoutedExperts(ids, RoutingLayout(64, 4, (1, 2, 3), 4))
payloads = [encode(sample[:12]), encode(sample)]
