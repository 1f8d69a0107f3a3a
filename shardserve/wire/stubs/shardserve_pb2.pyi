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
    __slots__ = ("replica", "generation", "state", "restarts", "ranks", "dropped")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    replica: int
    generation: Generation
    state: str
    restarts: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    dropped: int
    def __init__(self, replica: _Optional[int] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ..., state: _Optional[str] = ..., restarts: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., dropped: _Optional[int] = ...) -> None: ...

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
