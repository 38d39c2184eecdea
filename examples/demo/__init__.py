"""Roll out in vLLM, replay in Megatron, and report what the replay changed."""


class DemoError(Exception):
    """Something that the user can mend; the message is all that is shown."""
