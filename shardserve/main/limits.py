"""Every bound and delay of Main in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds are per servable version; times are in seconds, sizes in bytes."""

    max_requests: int = 4096
    """Requests without an answer; one more is Overloaded."""

    max_bytes: int = 2 << 30
    """Inputs of those requests, which Main keeps until they are answered."""

    max_unsent: int = 1 << 30
    """What the Worker hasn't taken from its connection yet."""

    max_submissions: int = 3
    """Workers that may end under one request; then it is Aborted, so that no request takes a service down for ever."""

    deadline_margin: float = 0.02
    """How long before its deadline a request is answered with DeadlineExceeded, so that the text still reaches the
    client; at most a tenth of the time that it had."""

    reconnect_delay: float = 0.1
    """Before connecting again to a Worker that ended a connection without having said anything."""

    flush: float = 0.5
    """At a stop, for the last answers to leave, if that is more than what is left of the grace."""
