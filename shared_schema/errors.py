"""The one error class of the schema."""

_LONGEST = 2_000


class RoutingSchemaError(ValueError):
    """Routed-experts data that breaks the schema.

    The message names the field, the value seen, the value expected and the fix. It quotes data
    from outside, so a long one is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
        super().__init__(message)
