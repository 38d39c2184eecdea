"""What ends a command."""


class CommandError(Exception):
    """The command cannot do what was asked; the message is one sentence, with the fix."""


class UsageError(CommandError):
    """The command line asks for something that makes no sense."""
