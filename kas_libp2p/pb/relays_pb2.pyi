from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Request(_message.Message):
    __slots__ = ("most",)
    MOST_FIELD_NUMBER: _ClassVar[int]
    most: int
    def __init__(self, most: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("operator", "free", "relays")
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    RELAYS_FIELD_NUMBER: _ClassVar[int]
    operator: bytes
    free: int
    relays: _containers.RepeatedCompositeFieldContainer[Relay]
    def __init__(self, operator: _Optional[bytes] = ..., free: _Optional[int] = ..., relays: _Optional[_Iterable[_Union[Relay, _Mapping]]] = ...) -> None: ...

class Relay(_message.Message):
    __slots__ = ("id", "addrs", "operator", "free", "age")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRS_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    addrs: _containers.RepeatedScalarFieldContainer[bytes]
    operator: bytes
    free: int
    age: int
    def __init__(self, id: _Optional[bytes] = ..., addrs: _Optional[_Iterable[bytes]] = ..., operator: _Optional[bytes] = ..., free: _Optional[int] = ..., age: _Optional[int] = ...) -> None: ...
