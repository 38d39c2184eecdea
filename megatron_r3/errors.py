"""Every error that this package raises by itself."""


class RoutingReplayError(Exception):
    """Routing replay cannot do what was asked.

    The message names the thing, the value seen, the value expected and the fix.
    """


class UnsupportedRouterError(RoutingReplayError):
    """``attach`` met a router whose choice cannot be replayed as it is configured."""


class InvalidRoutesError(RoutingReplayError, ValueError):
    """Routes given to ``feed`` do not fit the model or the micro-batch."""


class LayoutMismatchError(InvalidRoutesError):
    """Routes of another model: other MoE layers, another E or another k."""


class RowCountError(InvalidRoutesError):
    """More or fewer rows than the tokens of a sample, or than the rows that a router sees."""


class InvalidExpertsError(InvalidRoutesError):
    """A recorded row with an id outside 0 … E-1 or the same expert twice."""


class ReplayStateError(RoutingReplayError):
    """Calls in an order that leaves it open which routes belong to which forward."""
