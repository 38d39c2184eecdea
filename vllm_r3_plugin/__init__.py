"""vLLM general plugin that captures routed experts and returns them in vLLM's outputs."""


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``."""
