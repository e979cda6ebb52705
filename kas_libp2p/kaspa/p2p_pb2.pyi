from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KaspadMessage(_message.Message):
    __slots__ = ("response_id", "request_id", "addresses", "block", "requestAddresses", "requestRelayBlocks", "requestTransactions", "invRelayBlock", "invTransactions", "ping", "pong", "verack", "version", "transactionNotFound", "reject", "ready")
    RESPONSE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    REQUESTADDRESSES_FIELD_NUMBER: _ClassVar[int]
    REQUESTRELAYBLOCKS_FIELD_NUMBER: _ClassVar[int]
    REQUESTTRANSACTIONS_FIELD_NUMBER: _ClassVar[int]
    INVRELAYBLOCK_FIELD_NUMBER: _ClassVar[int]
    INVTRANSACTIONS_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    VERACK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSACTIONNOTFOUND_FIELD_NUMBER: _ClassVar[int]
    REJECT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    response_id: int
    request_id: int
    addresses: Addresses
    block: Block
    requestAddresses: RequestAddresses
    requestRelayBlocks: RequestRelayBlocks
    requestTransactions: RequestTransactions
    invRelayBlock: InvRelayBlock
    invTransactions: InvTransactions
    ping: Ping
    pong: Pong
    verack: Empty
    version: Version
    transactionNotFound: TransactionNotFound
    reject: Reject
    ready: Empty
    def __init__(self, response_id: _Optional[int] = ..., request_id: _Optional[int] = ..., addresses: _Optional[_Union[Addresses, _Mapping]] = ..., block: _Optional[_Union[Block, _Mapping]] = ..., requestAddresses: _Optional[_Union[RequestAddresses, _Mapping]] = ..., requestRelayBlocks: _Optional[_Union[RequestRelayBlocks, _Mapping]] = ..., requestTransactions: _Optional[_Union[RequestTransactions, _Mapping]] = ..., invRelayBlock: _Optional[_Union[InvRelayBlock, _Mapping]] = ..., invTransactions: _Optional[_Union[InvTransactions, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., verack: _Optional[_Union[Empty, _Mapping]] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., transactionNotFound: _Optional[_Union[TransactionNotFound, _Mapping]] = ..., reject: _Optional[_Union[Reject, _Mapping]] = ..., ready: _Optional[_Union[Empty, _Mapping]] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Version(_message.Message):
    __slots__ = ("protocolVersion", "services", "timestamp", "address", "id", "userAgent", "disableRelayTx", "network")
    PROTOCOLVERSION_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    USERAGENT_FIELD_NUMBER: _ClassVar[int]
    DISABLERELAYTX_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    protocolVersion: int
    services: int
    timestamp: int
    address: NetAddress
    id: bytes
    userAgent: str
    disableRelayTx: bool
    network: str
    def __init__(self, protocolVersion: _Optional[int] = ..., services: _Optional[int] = ..., timestamp: _Optional[int] = ..., address: _Optional[_Union[NetAddress, _Mapping]] = ..., id: _Optional[bytes] = ..., userAgent: _Optional[str] = ..., disableRelayTx: bool = ..., network: _Optional[str] = ...) -> None: ...

class NetAddress(_message.Message):
    __slots__ = ("timestamp", "ip", "port")
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    IP_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    timestamp: int
    ip: bytes
    port: int
    def __init__(self, timestamp: _Optional[int] = ..., ip: _Optional[bytes] = ..., port: _Optional[int] = ...) -> None: ...

class Reject(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Addresses(_message.Message):
    __slots__ = ("addressList",)
    ADDRESSLIST_FIELD_NUMBER: _ClassVar[int]
    addressList: _containers.RepeatedCompositeFieldContainer[NetAddress]
    def __init__(self, addressList: _Optional[_Iterable[_Union[NetAddress, _Mapping]]] = ...) -> None: ...

class RequestAddresses(_message.Message):
    __slots__ = ("includeAllSubnetworks",)
    INCLUDEALLSUBNETWORKS_FIELD_NUMBER: _ClassVar[int]
    includeAllSubnetworks: bool
    def __init__(self, includeAllSubnetworks: bool = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class Hash(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: bytes
    def __init__(self, bytes: _Optional[bytes] = ...) -> None: ...

class InvRelayBlock(_message.Message):
    __slots__ = ("hash",)
    HASH_FIELD_NUMBER: _ClassVar[int]
    hash: Hash
    def __init__(self, hash: _Optional[_Union[Hash, _Mapping]] = ...) -> None: ...

class InvTransactions(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedCompositeFieldContainer[Hash]
    def __init__(self, ids: _Optional[_Iterable[_Union[Hash, _Mapping]]] = ...) -> None: ...

class RequestRelayBlocks(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedCompositeFieldContainer[Hash]
    def __init__(self, hashes: _Optional[_Iterable[_Union[Hash, _Mapping]]] = ...) -> None: ...

class RequestTransactions(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedCompositeFieldContainer[Hash]
    def __init__(self, ids: _Optional[_Iterable[_Union[Hash, _Mapping]]] = ...) -> None: ...

class TransactionNotFound(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: Hash
    def __init__(self, id: _Optional[_Union[Hash, _Mapping]] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("header", "transactions")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TRANSACTIONS_FIELD_NUMBER: _ClassVar[int]
    header: BlockHeader
    transactions: _containers.RepeatedCompositeFieldContainer[Transaction]
    def __init__(self, header: _Optional[_Union[BlockHeader, _Mapping]] = ..., transactions: _Optional[_Iterable[_Union[Transaction, _Mapping]]] = ...) -> None: ...

class BlockHeader(_message.Message):
    __slots__ = ("version", "hashMerkleRoot", "acceptedIdMerkleRoot", "utxoCommitment", "timestamp", "bits", "nonce", "daaScore", "blueWork", "parents", "blueScore", "pruningPoint")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HASHMERKLEROOT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTEDIDMERKLEROOT_FIELD_NUMBER: _ClassVar[int]
    UTXOCOMMITMENT_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    DAASCORE_FIELD_NUMBER: _ClassVar[int]
    BLUEWORK_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    BLUESCORE_FIELD_NUMBER: _ClassVar[int]
    PRUNINGPOINT_FIELD_NUMBER: _ClassVar[int]
    version: int
    hashMerkleRoot: Hash
    acceptedIdMerkleRoot: Hash
    utxoCommitment: Hash
    timestamp: int
    bits: int
    nonce: int
    daaScore: int
    blueWork: bytes
    parents: _containers.RepeatedCompositeFieldContainer[BlockLevelParents]
    blueScore: int
    pruningPoint: Hash
    def __init__(self, version: _Optional[int] = ..., hashMerkleRoot: _Optional[_Union[Hash, _Mapping]] = ..., acceptedIdMerkleRoot: _Optional[_Union[Hash, _Mapping]] = ..., utxoCommitment: _Optional[_Union[Hash, _Mapping]] = ..., timestamp: _Optional[int] = ..., bits: _Optional[int] = ..., nonce: _Optional[int] = ..., daaScore: _Optional[int] = ..., blueWork: _Optional[bytes] = ..., parents: _Optional[_Iterable[_Union[BlockLevelParents, _Mapping]]] = ..., blueScore: _Optional[int] = ..., pruningPoint: _Optional[_Union[Hash, _Mapping]] = ...) -> None: ...

class BlockLevelParents(_message.Message):
    __slots__ = ("parentHashes",)
    PARENTHASHES_FIELD_NUMBER: _ClassVar[int]
    parentHashes: _containers.RepeatedCompositeFieldContainer[Hash]
    def __init__(self, parentHashes: _Optional[_Iterable[_Union[Hash, _Mapping]]] = ...) -> None: ...

class Transaction(_message.Message):
    __slots__ = ("version", "lockTime", "gas", "payload")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOCKTIME_FIELD_NUMBER: _ClassVar[int]
    GAS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    version: int
    lockTime: int
    gas: int
    payload: bytes
    def __init__(self, version: _Optional[int] = ..., lockTime: _Optional[int] = ..., gas: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...
