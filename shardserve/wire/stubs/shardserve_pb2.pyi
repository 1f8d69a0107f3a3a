from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("servables",)
    SERVABLES_FIELD_NUMBER: _ClassVar[int]
    servables: _containers.RepeatedCompositeFieldContainer[ServableStatus]
    def __init__(self, servables: _Optional[_Iterable[_Union[ServableStatus, _Mapping]]] = ...) -> None: ...

class ServableStatus(_message.Message):
    __slots__ = ("name", "version", "state", "reason", "rank_size", "stage_size", "methods", "replicas", "waiting_requests", "waiting_bytes", "resubmitted", "ignored_answers")
    class MethodsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: MethodStatus
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[MethodStatus, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RANK_SIZE_FIELD_NUMBER: _ClassVar[int]
    STAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESUBMITTED_FIELD_NUMBER: _ClassVar[int]
    IGNORED_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    state: str
    reason: str
    rank_size: int
    stage_size: int
    methods: _containers.MessageMap[str, MethodStatus]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    waiting_requests: int
    waiting_bytes: int
    resubmitted: int
    ignored_answers: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., rank_size: _Optional[int] = ..., stage_size: _Optional[int] = ..., methods: _Optional[_Mapping[str, MethodStatus]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., waiting_requests: _Optional[int] = ..., waiting_bytes: _Optional[int] = ..., resubmitted: _Optional[int] = ..., ignored_answers: _Optional[int] = ...) -> None: ...

class MethodStatus(_message.Message):
    __slots__ = ("inputs", "outputs", "dtypes")
    class DtypesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedScalarFieldContainer[str]
    outputs: _containers.RepeatedScalarFieldContainer[str]
    dtypes: _containers.ScalarMap[str, str]
    def __init__(self, inputs: _Optional[_Iterable[str]] = ..., outputs: _Optional[_Iterable[str]] = ..., dtypes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica", "generation", "state", "restarts", "ranks", "dropped", "reason")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    replica: int
    generation: Generation
    state: str
    restarts: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    dropped: int
    reason: str
    def __init__(self, replica: _Optional[int] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ..., state: _Optional[str] = ..., restarts: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., dropped: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("incarnation", "counter")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    counter: int
    def __init__(self, incarnation: _Optional[int] = ..., counter: _Optional[int] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "stage", "host", "device", "pid", "state")
    RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    stage: int
    host: str
    device: str
    pid: int
    state: str
    def __init__(self, rank: _Optional[int] = ..., stage: _Optional[int] = ..., host: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class TimelineRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class TimelineReply(_message.Message):
    __slots__ = ("servables",)
    SERVABLES_FIELD_NUMBER: _ClassVar[int]
    servables: _containers.RepeatedCompositeFieldContainer[ServableTimeline]
    def __init__(self, servables: _Optional[_Iterable[_Union[ServableTimeline, _Mapping]]] = ...) -> None: ...

class ServableTimeline(_message.Message):
    __slots__ = ("name", "version", "reason", "capacity", "now", "replicas", "ranks", "missing_ranks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    MISSING_RANKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    reason: str
    capacity: int
    now: float
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaTimeline]
    ranks: _containers.RepeatedCompositeFieldContainer[RankTimeline]
    missing_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., reason: _Optional[str] = ..., capacity: _Optional[int] = ..., now: _Optional[float] = ..., replicas: _Optional[_Iterable[_Union[ReplicaTimeline, _Mapping]]] = ..., ranks: _Optional[_Iterable[_Union[RankTimeline, _Mapping]]] = ..., missing_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class ReplicaTimeline(_message.Message):
    __slots__ = ("replica", "incarnations", "counters", "steps", "subgraphs", "instances", "forms", "dims", "queued", "sent", "answered", "failed", "ended")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SUBGRAPHS_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    replica: int
    incarnations: _containers.RepeatedScalarFieldContainer[int]
    counters: _containers.RepeatedScalarFieldContainer[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    subgraphs: _containers.RepeatedScalarFieldContainer[int]
    instances: _containers.RepeatedScalarFieldContainer[int]
    forms: _containers.RepeatedScalarFieldContainer[int]
    dims: _containers.RepeatedCompositeFieldContainer[Dims]
    queued: _containers.RepeatedScalarFieldContainer[float]
    sent: _containers.RepeatedScalarFieldContainer[float]
    answered: _containers.RepeatedScalarFieldContainer[float]
    failed: _containers.RepeatedScalarFieldContainer[bool]
    ended: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, replica: _Optional[int] = ..., incarnations: _Optional[_Iterable[int]] = ..., counters: _Optional[_Iterable[int]] = ..., steps: _Optional[_Iterable[int]] = ..., subgraphs: _Optional[_Iterable[int]] = ..., instances: _Optional[_Iterable[int]] = ..., forms: _Optional[_Iterable[int]] = ..., dims: _Optional[_Iterable[_Union[Dims, _Mapping]]] = ..., queued: _Optional[_Iterable[float]] = ..., sent: _Optional[_Iterable[float]] = ..., answered: _Optional[_Iterable[float]] = ..., failed: _Optional[_Iterable[bool]] = ..., ended: _Optional[_Iterable[bool]] = ...) -> None: ...

class Dims(_message.Message):
    __slots__ = ("sizes",)
    class SizesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SIZES_FIELD_NUMBER: _ClassVar[int]
    sizes: _containers.ScalarMap[str, int]
    def __init__(self, sizes: _Optional[_Mapping[str, int]] = ...) -> None: ...

class RankTimeline(_message.Message):
    __slots__ = ("replica", "rank", "stage", "host", "device", "pid", "clock_offset", "clock_error", "incarnations", "counters", "steps", "received", "ready", "started", "finished")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CLOCK_OFFSET_FIELD_NUMBER: _ClassVar[int]
    CLOCK_ERROR_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    replica: int
    rank: int
    stage: int
    host: str
    device: str
    pid: int
    clock_offset: float
    clock_error: float
    incarnations: _containers.RepeatedScalarFieldContainer[int]
    counters: _containers.RepeatedScalarFieldContainer[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    received: _containers.RepeatedScalarFieldContainer[float]
    ready: _containers.RepeatedScalarFieldContainer[float]
    started: _containers.RepeatedScalarFieldContainer[float]
    finished: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, replica: _Optional[int] = ..., rank: _Optional[int] = ..., stage: _Optional[int] = ..., host: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., clock_offset: _Optional[float] = ..., clock_error: _Optional[float] = ..., incarnations: _Optional[_Iterable[int]] = ..., counters: _Optional[_Iterable[int]] = ..., steps: _Optional[_Iterable[int]] = ..., received: _Optional[_Iterable[float]] = ..., ready: _Optional[_Iterable[float]] = ..., started: _Optional[_Iterable[float]] = ..., finished: _Optional[_Iterable[float]] = ...) -> None: ...
