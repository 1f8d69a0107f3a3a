"""Every timeout and limit of the system, in one place; docs/settings.md has them for users.

A field is set by the environment variable SHARDSERVE_<NAME IN CAPITALS> of the launcher or of `startup_agents`; the
processes that they start inherit it. Times are in seconds, sizes in bytes. A variable whose name is nearly one of these
is an error; of others that begin so the process that the user starts warns, except of those that Kubernetes sets for a
service that is called shardserve.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from shardserve.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "SHARDSERVE_"
# As difflib counts it: STEP_TIMEOT and TIMEOUT are meant to be STEP_TIMEOUT; SERVICE_PORT is nothing of ours.
MISSPELT = 0.7

# Of the services shardserve, shardserve-grpc, …: SHARDSERVE_SERVICE_HOST, SHARDSERVE_GRPC_PORT_5500_TCP_ADDR, …
OF_KUBERNETES = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")

# poll() takes no more than 2**31 ms; 11 days are as good as for ever.
LONGEST = 1_000_000
MOST = (1 << 31) - 1
MOST_BYTES = 1 << 50
GREATEST = {
    # A probe of TCP keepalive can wait 32767 s; it begins after half of this.
    "peer_timeout": 65_534,
    # Each step in flight keeps its inputs.
    "steps_ahead": 1024,
    # One message has to take them.
    "timeline_steps": 1 << 18,
    "agent_threads": 1024,
    # Mapped by each rank, two for each of its group.
    "collective_slot_bytes": 1 << 30,
}

CHOICES = {
    "collective": ("auto", "shared_memory", "gloo", "nccl"),
    "compile": ("off", "inductor", "cuda_graphs"),
    "weights": ("read", "mmap"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    connect_retry_interval: float = 0.2
    """Between two attempts to reach a Worker that doesn't listen yet: a far listener is no event to wait for."""
    load_timeout: float = 600.0
    """For an agent to load its shard, counted from its fork; then the kernel ends it and it is forked anew."""
    form_timeout: float = 30.0
    """For all agents of a group to join a new generation."""
    form_backoff: float = 0.1
    """Before a group that could not form tries again; doubled each time."""
    max_formings: int = 6
    """How often in a row a group whose ranks are all there may fail to form; then it is failed."""
    join_timeout: float = 10.0
    """For the two sides of a connection between hosts to prove themselves (TLS, join secret)."""
    max_joining: int = 256
    """Connections to one address that have not proved themselves yet; over it, the oldest of them is closed."""
    peer_timeout: float = 20.0
    """Until a host that vanished without a word is given up (TCP keepalive, TCP_USER_TIMEOUT)."""
    step_timeout: float = 300.0
    """For a step, from when it was sent until its answer; then its generation ends."""
    stage_timeout: float = 300.0
    """For one call of a Python stage; then its process is replaced, and its instance gets an error. The instances of a
    batch are run again, each alone."""
    stage_grace: float = 1.0
    """How long a Python stage may run on when nobody waits for it any more (the deadline passed, the client left);
    then its process is replaced."""
    stage_batch_limit: int = 64
    """Instances in one call of a Python stage whose batch_size is 0."""
    abort_timeout: float = 1.0
    """For a survivor to leave its generation; then it is killed and forked anew."""
    reconnect_timeout: float = 60.0
    """How long agents and supervisors keep their weights and wait for a Worker that is gone."""
    stop_grace: float = 5.0
    """For requests under way when the server is told to stop."""
    exit_timeout: float = 5.0
    """For a process that was told to end; then it is killed."""
    config_timeout: float = 120.0
    """For a servable_config.py to run, with all that it imports; then its Worker is ended, and its start an error."""
    start_timeout: float = 60.0
    """For Main or a Worker to answer its first order, for a fork server to fork an agent, and for a process of Python
    stages to be ready."""
    heartbeat_timeout: float = 20.0
    """For Main or a Worker to answer its launcher's ping, four of which are sent in that time; then it is taken for
    frozen, killed and respawned. A Worker that still runs its servable_config.py isn't asked."""
    waiting_notice: float = 10.0
    """Until a start that waits, or a servable whose agents are gone, says in the log what for; it says it again each
    time after twice as long."""
    max_restarts: int = 10
    """How often one rank may die within `restart_window` before its host gives up on it."""
    restart_window: float = 60.0
    max_requests: int = 4096
    """Requests of one servable in Main that have no answer yet; over it, Overloaded."""
    max_instances: int = 4096
    """Of one request; over it, MessageTooLarge."""
    max_request_bytes: int = 2 << 30
    """Inputs of those requests, which Main keeps until they are answered."""
    max_receiving_bytes: int = 2 << 30
    """Bodies of REST requests that are being received and read; over it, Overloaded."""
    receive_timeout: float = 60.0
    """Without any more of the body of a REST request; then it is DeadlineExceeded, and its connection is closed. A head
    has as long to come as a whole, from when the connection was made, or a further request began."""
    json_timeout: float = 120.0
    """For the process that reads and writes large JSON bodies, for one of them; then it is killed and replaced, and the
    request gets DeadlineExceeded."""
    max_calls: int = 8192
    """gRPC calls under way at one address, those that watch the health included; over it, RESOURCE_EXHAUSTED. Times
    max_msg_mb_size it is all that bounds the bytes of messages that come: gRPC's Python half takes no memory quota."""
    max_unsent_bytes: int = 1 << 30
    """Frames of Main to one Worker that its connection hasn't taken yet, without what is in shared memory; over it,
    Overloaded."""
    max_submissions: int = 3
    """Workers that may end under one request; then it is Aborted, so that none takes a service down for ever."""
    deadline_margin: float = 0.02
    """How long before its deadline Main answers a request with DeadlineExceeded, so that the text still reaches the
    client; at most a tenth of the time that it had."""
    reconnect_delay: float = 0.1
    """Before Main connects again to a Worker that ended a connection without having said anything."""
    flush_timeout: float = 0.5
    """At a stop, for the last answers to leave, if that is more than what is left of stop_grace."""
    queue_limit: int = 4096
    """Instances that wait in a Worker; over it, requests are answered with Overloaded."""
    steps_ahead: int = 1
    """Steps under way in a group beyond one a pipeline stage: a stage's next input is there when it has finished a
    step. The more there are, the earlier batches are closed, and the less is in them."""
    timeline_steps: int = 4096
    """Whose times each agent, and a Worker for each replica, remembers for `shardserve trace`, in about 300 bytes
    each."""
    timeline_timeout: float = 10.0
    """At most, for a Worker to tell Main what was recorded, where the client's deadline isn't nearer; for its agents to
    tell the Worker, half of that."""
    agent_threads: int = 0
    """Of torch's operators, in each agent. 0: the cores that this host's agents may use, shared out among them."""
    shared_memory_bytes: int = 2 << 30
    """Of large payloads on their way between processes of one host, for each that sends; over it, they go through
    sockets."""
    shared_memory_idle: float = 60.0
    """How long such memory is kept when it isn't needed."""
    collective_slot_bytes: int = 1 << 20
    """Shared memory of one rank for one collective; larger tensors go in several pieces."""

    collective: str = "auto"
    """Of tensor-parallel groups. auto: on CUDA nccl; on CPU shared_memory on one host, else gloo. Or one for all: gloo
    on either, the others where auto has them."""
    compile: str = "off"
    """Of a shard's graph. inductor, on CPU: each agent starts eager, compiles its graph beside its steps when the cores
    are idle, and changes over when that is done; needs a C++ compiler on the host. cuda_graphs, on CUDA: what is
    between two collectives is captured when a combination of dims comes for the second time."""
    weights: str = "read"
    """How an agent on CPU has its weights. read: in memory of its own. mmap: as a view of the file, so that agents of
    one host that serve the same file share it in the page cache; the file must not change, and on a network disk each
    page that isn't cached any more is fetched again in the middle of a step."""
    log_level: str = "WARNING"
    """Of our own processes: DEBUG, INFO, WARNING, ERROR or CRITICAL."""
    join_secret_file: str = ""
    """The secret of the distributed address where the argument join_secret_file isn't given; a path as that one."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """ConfigError names the variable that isn't a positive number, is too large, none of its choices, or
        misspelt."""
        given: dict[str, float | int | str] = {}
        known = {field.name.upper(): field for field in fields(cls)}
        for name in _unknown(environment):
            if near := difflib.get_close_matches(name.removeprefix(PREFIX).upper(), known, 1, MISSPELT):
                raise ConfigError(f"environment variable {name} is no setting; did you mean {PREFIX}{near[0]}?")
        for ours, field in known.items():
            name = PREFIX + ours
            text = environment.get(name)
            if text is None:
                continue
            if field.type == "str":
                choices = CHOICES.get(field.name)
                if choices is not None and text not in choices:
                    raise ConfigError(f"environment variable {name}={text!r} is none of {', '.join(choices)}")
                given[field.name] = text
                continue
            try:
                value = int(text) if field.type == "int" else float(text)
            except ValueError:
                value = -1
            if not 0 < value < float("inf"):
                raise ConfigError(f"environment variable {name}={text!r} is not a positive {field.type}")
            if value > (greatest := _greatest(field.name, field.type == "int")):
                raise ConfigError(f"environment variable {name}={text!r} is more than {greatest}")
            given[field.name] = value
        return cls(**given)  # type: ignore[arg-type]


def warn_of_unknown(environment: Mapping[str, str] = os.environ) -> None:
    """A warning for each variable that looks like ours and is no setting."""
    for name in _unknown(environment):
        logger.warning("environment variable %s is no setting, and ignored", name)


def _unknown(environment: Mapping[str, str]) -> list[str]:
    known = {PREFIX + field.name.upper() for field in fields(Settings)}
    ours = (name for name in environment if name.startswith(PREFIX) and name not in known)
    return sorted(name for name in ours if not OF_KUBERNETES.fullmatch(name.removeprefix(PREFIX)))


def _greatest(name: str, whole: bool) -> int:
    return GREATEST.get(name, LONGEST if not whole else MOST_BYTES if name.endswith("_bytes") else MOST)
