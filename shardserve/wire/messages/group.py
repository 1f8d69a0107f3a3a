"""Worker, supervisors and agents, on the Worker's distributed address.

The first message says who came: a supervisor (`Introduce`, then `Enlist`), once per host, or an agent (`Register`),
once per rank; both are answered by their counterpart or by `Refuse`, after which the connection ends. A generation is
formed by `Form` to every rank, each answered by `Formed` or `Broken`; then `Step`s follow, in the same order to every
rank. `End` ends it: a rank that has left its waits answers `Parked`. Every message about a generation carries it.
"""

from __future__ import annotations

from shardserve.wire.messages import Generation, Message
from shardserve.wire.messages.times import RankTimes


class Join(Message, frozen=True):
    """Before all others, where there is TLS or a join secret (wire/security.py has the exchange), on the distributed
    address and on stage links. nonce: 32 random bytes, or none from a side that has no secret."""

    nonce: bytes


class Challenge(Message, frozen=True):
    nonce: bytes


class Proof(Message, frozen=True):
    mac: bytes


class Admitted(Message, frozen=True):
    """mac: the listening side's own proof; empty where there is no secret."""

    mac: bytes


class Introduce(Message, frozen=True):
    """From a supervisor: asks which hosts the rank table has. supervisor: a random name that it has for its life: pids
    of different hosts and containers may be equal."""

    pid: int
    supervisor: str


class Roster(Message, frozen=True):
    """To a supervisor: the addresses of all hosts in the rank table."""

    hosts: tuple[str, ...]


class Enlist(Message, frozen=True):
    """From a supervisor. hosts: those of the roster that are addresses of its host; agent_ip and rank_start replace
    them where the rank table knows none. count: for how many ranks it was given model files."""

    hosts: tuple[str, ...]
    agent_ip: str | None
    rank_start: int | None
    count: int


class Enlisted(Message, frozen=True):
    """To a supervisor: the ranks of its host, the devices they take by the rank table, the address that the table has
    for the host, and the servable that they serve. model_files: what each rank loads, if it is not
    distributed."""

    ranks: tuple[int, ...]
    devices: tuple[str, ...]
    host: str
    rank_size: int
    stage_size: int
    servable: str
    version: int
    model_files: tuple[str, ...] = ()


class HostWaits(Message, frozen=True):
    """To a supervisor, when it has enlisted and at each change: its host's agents of these ranks aren't there."""

    missing: tuple[int, ...]


class HostReady(Message, frozen=True):
    """As HostWaits: all of its host's agents are there."""


class Kill(Message, frozen=True):
    """To a supervisor: this agent doesn't leave its generation; end it, fork it anew."""

    rank: int
    pid: int
    reason: str


class Forgive(Message, frozen=True):
    """To a supervisor: a death of this rank was the fault of a request, and doesn't count against its restarts."""

    rank: int


class GaveUp(Message, frozen=True):
    """From a supervisor: this rank died too often, or never came up; it is not forked again."""

    rank: int
    reason: str


class Exit(Message, frozen=True):
    """To agents and supervisors: the servable is stopped; leave."""

    reason: str


class Refuse(Message, frozen=True):
    """error: a class name of shardserve.errors."""

    error: str
    message: str


class Register(Message, frozen=True):
    """From an agent that holds its shard. supervisor: the name of the one that forked it. incarnation: the greatest it
    has seen. stage_address: where it takes the link of the previous pipeline stage. configs: one group config per
    subgraph, as in group_config.json."""

    rank: int
    pid: int
    supervisor: str
    device: str
    incarnation: int
    stage_address: str
    configs: list[dict[str, object]]


class Registered(Message, frozen=True):
    incarnation: int


class Form(Message, frozen=True):
    """collective: shared_memory, gloo or nccl. next_address: the agent of the same coordinate in the next pipeline
    stage."""

    generation: Generation
    collective: str
    next_address: str | None


class Formed(Message, frozen=True):
    generation: Generation


class Broken(Message, frozen=True):
    """From an agent: it can't go on in this generation (a link or collective failed, a drain raised)."""

    generation: Generation
    message: str


class Step(Message, frozen=True):
    """Payload: for the first pipeline stage the input tensors, for the others nothing. Shapes follow from `dims`.
    reset: the buffers that agents keep between steps are first put back to what they were when they were loaded."""

    generation: Generation
    step: int
    subgraph: int
    dims: dict[str, int]
    reset: bool = False


class Output(Message, frozen=True):
    """From the leader of the last pipeline stage. Payload: the outputs, whose shapes follow from the step's dims."""

    generation: Generation
    step: int


class StepFailed(Message, frozen=True):
    """From any rank: the model raised. The rank waits for `FailureNoted` before it takes part in the step's remaining
    collectives, so that no answer made of its zeros can reach the Worker before this message."""

    generation: Generation
    step: int
    message: str


class FailureNoted(Message, frozen=True):
    generation: Generation
    step: int


class End(Message, frozen=True):
    generation: Generation


class Parked(Message, frozen=True):
    generation: Generation


class StoreCall(Message, frozen=True):
    """A call of the store that gloo and NCCL use while a group forms; `call` numbers it on its connection."""

    generation: Generation
    call: int
    operation: str
    keys: tuple[str, ...]
    value: bytes


class StoreReply(Message, frozen=True):
    generation: Generation
    call: int
    value: bytes


class AskTimes(Message, frozen=True):
    """To an agent: what it has recorded of its steps. Answered by `Clock` at once, then by `Times`."""

    request: int


class Clock(Message, frozen=True):
    """now: the agent's CLOCK_MONOTONIC when it read the request, in seconds."""

    request: int
    now: float


class Times(Message, frozen=True):
    request: int
    times: RankTimes


class StageHello(Message, frozen=True):
    """Agent to agent, first on a stage link: who sends, in which generation."""

    generation: Generation
    rank: int


class Transfer(Message, frozen=True):
    """Agent to agent: the tensors that cross the cut in this step; their shapes follow from the step's dims."""

    generation: Generation
    step: int


FromGroup = (
    Join
    | Introduce
    | Enlist
    | GaveUp
    | Register
    | Formed
    | Broken
    | Output
    | StepFailed
    | Parked
    | StoreCall
    | Clock
    | Times
)
ToSupervisor = Roster | Enlisted | HostWaits | HostReady | Kill | Forgive | Exit | Refuse
ToAgent = Registered | Form | Step | FailureNoted | End | Exit | Refuse | StoreReply | AskTimes
OnStageLink = StageHello | Transfer
