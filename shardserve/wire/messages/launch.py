"""Launcher and its children, over the socketpair that each child inherits. Its end (EOF) ends the child.

The launcher numbers its orders; each is answered by `Done` or `Refused` with the same number.
"""

from __future__ import annotations

import msgspec

from shardserve.wire.messages import Message


class Done(Message, frozen=True):
    order: int


class Refused(Message, frozen=True):
    """error: a class name of shardserve.errors."""

    order: int
    error: str
    message: str


class TLSFiles(msgspec.Struct, frozen=True, array_like=True):
    certificate: str
    private_key: str
    custom_ca: str | None
    verify_client: bool


class SecurityFiles(msgspec.Struct, frozen=True, array_like=True):
    """What guards the distributed address and stage links: beyond loopback one of the first two, unless `insecure`."""

    join_secret_file: str | None = None
    tls: TLSFiles | None = None
    insecure: bool = False

    @property
    def local_only(self) -> bool:
        """Whether nothing says who may join: then only local processes of the same user may, whom the kernel names."""
        return self.join_secret_file is None and self.tls is None and not self.insecure


UNGUARDED = SecurityFiles()


class Attach(Message, frozen=True):
    """To Main: the Worker of this servable version listens at `address` (an abstract Unix socket, without its NUL).

    Sent again, with the same address, when the Worker was respawned."""

    order: int
    name: str
    version: int
    address: str


class Detach(Message, frozen=True):
    """To Main: this servable version was not started after all; what waits for it ends with Unavailable."""

    order: int
    name: str
    version: int


class StartGrpc(Message, frozen=True):
    """To Main. address: ip:port or unix:path."""

    order: int
    address: str
    max_msg_mb_size: int
    tls: TLSFiles | None


class StartRest(Message, frozen=True):
    order: int
    address: str
    max_msg_mb_size: int
    tls: TLSFiles | None


class Stop(Message, frozen=True):
    """Refuse what is new, wait up to `grace` seconds for what is under way, then end."""

    order: int
    grace: float


class Serve(Message, frozen=True):
    """To a Worker, its first message: all that it needs to know.

    num_parallel_workers: processes for Python stages. devices: of a servable that is not distributed, one for each
    replica; there is no rank table then. own_agents: the launcher's process has its agents, too, and says itself what
    is wrong with them. was_ready: under a former Worker."""

    order: int
    servable_directory: str
    servable_name: str
    version: int
    rank_table_json_file: str
    incarnation: int
    wait_agents_time_in_seconds: float
    security: SecurityFiles = SecurityFiles()
    num_parallel_workers: int = 1
    devices: tuple[int, ...] | None = None
    own_agents: bool = False
    was_ready: bool = False


class Incarnation(Message, frozen=True):
    """From a Worker: agents knew a greater incarnation, it now uses this one; the launcher counts on from it."""

    incarnation: int


class Loaded(Message, frozen=True):
    """From a Worker: its servable_config.py has run."""


class Waiting(Message, frozen=True):
    """From a Worker that isn't ready: how many agents it needs, which ranks' have not registered, and why one of them,
    unless another comes in its place, never will ("" as long as none is given up)."""

    total: int
    missing: tuple[int, ...]
    reason: str = ""


class Ping(Message, frozen=True):
    """To Main or a Worker that has said something already: answered by a `Pong` at once, whatever else it does."""


class Pong(Message, frozen=True):
    pass


ToMain = Attach | Detach | StartGrpc | StartRest | Stop | Ping
ToWorker = Serve | Stop | Ping
ToLauncher = Done | Refused | Incarnation | Loaded | Waiting | Pong
