"""The exception types whose messages are meant for the user."""


class UserError(ValueError):
    """Bad input that the user can put right.

    The message is one clear sentence: what was wrong, what is allowed, what to do. The scripts print it without a
    traceback and exit with status 2; every other exception is a bug and keeps its traceback.
    """


class PeerFailed(UserError):
    """Another process of the command has failed, which says itself why."""


class Disconnected(PeerFailed):
    """Another process of the command has ended; this one can compute nothing any more that needs all of them."""

    failed = False  # the evaluation counts as unfinished, since the next command goes on with it


class Interrupted(Exception):
    """The run received a signal to stop and saved its state; it can be resumed. The scripts exit with status 75."""
