"""The one error class of the schema."""


class RoutingSchemaError(ValueError):
    """Routed-experts data that breaks the schema.

    The message names the field, the value seen, the value expected and the fix.
    """
