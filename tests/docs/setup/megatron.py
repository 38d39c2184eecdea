from tests.docs.small_megatron import (  # noqa: F401
    build_model,
    forward_backward_func,
    loss_function,
    start,
)

start()
model_chunks = build_model()
