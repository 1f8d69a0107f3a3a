"""What ends a generation from inside a collective."""


class CollectiveBroken(Exception):
    """A group can't go on together: a rank is at another collective, unreachable, or was waited for too long."""
