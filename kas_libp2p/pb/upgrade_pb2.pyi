from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Nat(_message.Message):
    __slots__ = ("mapping", "ports", "filtering", "unsolicited", "lifetime_s", "sightings")
    class Mapping(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MAPPING_UNKNOWN: _ClassVar[Nat.Mapping]
        NONE: _ClassVar[Nat.Mapping]
        INDEPENDENT: _ClassVar[Nat.Mapping]
        DEPENDENT: _ClassVar[Nat.Mapping]
    MAPPING_UNKNOWN: Nat.Mapping
    NONE: Nat.Mapping
    INDEPENDENT: Nat.Mapping
    DEPENDENT: Nat.Mapping
    class Ports(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PORTS_UNKNOWN: _ClassVar[Nat.Ports]
        KEPT: _ClassVar[Nat.Ports]
        CHANGED: _ClassVar[Nat.Ports]
        SEQUENTIAL: _ClassVar[Nat.Ports]
        BLOCK: _ClassVar[Nat.Ports]
        RANDOM: _ClassVar[Nat.Ports]
    PORTS_UNKNOWN: Nat.Ports
    KEPT: Nat.Ports
    CHANGED: Nat.Ports
    SEQUENTIAL: Nat.Ports
    BLOCK: Nat.Ports
    RANDOM: Nat.Ports
    class Filtering(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FILTERING_UNKNOWN: _ClassVar[Nat.Filtering]
        OPEN: _ClassVar[Nat.Filtering]
        ADDRESS: _ClassVar[Nat.Filtering]
        PORT: _ClassVar[Nat.Filtering]
    FILTERING_UNKNOWN: Nat.Filtering
    OPEN: Nat.Filtering
    ADDRESS: Nat.Filtering
    PORT: Nat.Filtering
    class Unsolicited(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSOLICITED_UNKNOWN: _ClassVar[Nat.Unsolicited]
        DROPPED: _ClassVar[Nat.Unsolicited]
        REFUSED: _ClassVar[Nat.Unsolicited]
    UNSOLICITED_UNKNOWN: Nat.Unsolicited
    DROPPED: Nat.Unsolicited
    REFUSED: Nat.Unsolicited
    class Sighting(_message.Message):
        __slots__ = ("age_ms", "port")
        AGE_MS_FIELD_NUMBER: _ClassVar[int]
        PORT_FIELD_NUMBER: _ClassVar[int]
        age_ms: int
        port: int
        def __init__(self, age_ms: _Optional[int] = ..., port: _Optional[int] = ...) -> None: ...
    MAPPING_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    FILTERING_FIELD_NUMBER: _ClassVar[int]
    UNSOLICITED_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    SIGHTINGS_FIELD_NUMBER: _ClassVar[int]
    mapping: Nat.Mapping
    ports: Nat.Ports
    filtering: Nat.Filtering
    unsolicited: Nat.Unsolicited
    lifetime_s: int
    sightings: _containers.RepeatedCompositeFieldContainer[Nat.Sighting]
    def __init__(self, mapping: _Optional[_Union[Nat.Mapping, str]] = ..., ports: _Optional[_Union[Nat.Ports, str]] = ..., filtering: _Optional[_Union[Nat.Filtering, str]] = ..., unsolicited: _Optional[_Union[Nat.Unsolicited, str]] = ..., lifetime_s: _Optional[int] = ..., sightings: _Optional[_Iterable[_Union[Nat.Sighting, _Mapping]]] = ...) -> None: ...

class Intent(_message.Message):
    __slots__ = ("answer", "reason", "wait_s", "v4", "v6", "shares_local", "predicts", "birthday")
    class Answer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ANSWER_MISSING: _ClassVar[Intent.Answer]
        YES: _ClassVar[Intent.Answer]
        NO: _ClassVar[Intent.Answer]
        LATER: _ClassVar[Intent.Answer]
    ANSWER_MISSING: Intent.Answer
    YES: Intent.Answer
    NO: Intent.Answer
    LATER: Intent.Answer
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    V4_FIELD_NUMBER: _ClassVar[int]
    V6_FIELD_NUMBER: _ClassVar[int]
    SHARES_LOCAL_FIELD_NUMBER: _ClassVar[int]
    PREDICTS_FIELD_NUMBER: _ClassVar[int]
    BIRTHDAY_FIELD_NUMBER: _ClassVar[int]
    answer: Intent.Answer
    reason: str
    wait_s: int
    v4: Nat
    v6: Nat
    shares_local: bool
    predicts: bool
    birthday: bool
    def __init__(self, answer: _Optional[_Union[Intent.Answer, str]] = ..., reason: _Optional[str] = ..., wait_s: _Optional[int] = ..., v4: _Optional[_Union[Nat, _Mapping]] = ..., v6: _Optional[_Union[Nat, _Mapping]] = ..., shares_local: bool = ..., predicts: bool = ..., birthday: bool = ...) -> None: ...
