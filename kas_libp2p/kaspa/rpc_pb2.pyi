from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RpcRequest(_message.Message):
    __slots__ = ("id", "submitBlockRequest", "getBlockTemplateRequest", "notifyBlockAddedRequest", "getConnectedPeerInfoRequest", "addPeerRequest", "submitTransactionRequest", "getBlockDagInfoRequest", "getUtxosByAddressesRequest", "banRequest", "unbanRequest", "getInfoRequest", "getServerInfoRequest", "getSyncStatusRequest")
    ID_FIELD_NUMBER: _ClassVar[int]
    SUBMITBLOCKREQUEST_FIELD_NUMBER: _ClassVar[int]
    GETBLOCKTEMPLATEREQUEST_FIELD_NUMBER: _ClassVar[int]
    NOTIFYBLOCKADDEDREQUEST_FIELD_NUMBER: _ClassVar[int]
    GETCONNECTEDPEERINFOREQUEST_FIELD_NUMBER: _ClassVar[int]
    ADDPEERREQUEST_FIELD_NUMBER: _ClassVar[int]
    SUBMITTRANSACTIONREQUEST_FIELD_NUMBER: _ClassVar[int]
    GETBLOCKDAGINFOREQUEST_FIELD_NUMBER: _ClassVar[int]
    GETUTXOSBYADDRESSESREQUEST_FIELD_NUMBER: _ClassVar[int]
    BANREQUEST_FIELD_NUMBER: _ClassVar[int]
    UNBANREQUEST_FIELD_NUMBER: _ClassVar[int]
    GETINFOREQUEST_FIELD_NUMBER: _ClassVar[int]
    GETSERVERINFOREQUEST_FIELD_NUMBER: _ClassVar[int]
    GETSYNCSTATUSREQUEST_FIELD_NUMBER: _ClassVar[int]
    id: int
    submitBlockRequest: SubmitBlockRequest
    getBlockTemplateRequest: GetBlockTemplateRequest
    notifyBlockAddedRequest: NotifyRequest
    getConnectedPeerInfoRequest: EmptyRequest
    addPeerRequest: AddPeerRequest
    submitTransactionRequest: SubmitTransactionRequest
    getBlockDagInfoRequest: EmptyRequest
    getUtxosByAddressesRequest: GetUtxosByAddressesRequest
    banRequest: IpRequest
    unbanRequest: IpRequest
    getInfoRequest: EmptyRequest
    getServerInfoRequest: EmptyRequest
    getSyncStatusRequest: EmptyRequest
    def __init__(self, id: _Optional[int] = ..., submitBlockRequest: _Optional[_Union[SubmitBlockRequest, _Mapping]] = ..., getBlockTemplateRequest: _Optional[_Union[GetBlockTemplateRequest, _Mapping]] = ..., notifyBlockAddedRequest: _Optional[_Union[NotifyRequest, _Mapping]] = ..., getConnectedPeerInfoRequest: _Optional[_Union[EmptyRequest, _Mapping]] = ..., addPeerRequest: _Optional[_Union[AddPeerRequest, _Mapping]] = ..., submitTransactionRequest: _Optional[_Union[SubmitTransactionRequest, _Mapping]] = ..., getBlockDagInfoRequest: _Optional[_Union[EmptyRequest, _Mapping]] = ..., getUtxosByAddressesRequest: _Optional[_Union[GetUtxosByAddressesRequest, _Mapping]] = ..., banRequest: _Optional[_Union[IpRequest, _Mapping]] = ..., unbanRequest: _Optional[_Union[IpRequest, _Mapping]] = ..., getInfoRequest: _Optional[_Union[EmptyRequest, _Mapping]] = ..., getServerInfoRequest: _Optional[_Union[EmptyRequest, _Mapping]] = ..., getSyncStatusRequest: _Optional[_Union[EmptyRequest, _Mapping]] = ...) -> None: ...

class RpcResponse(_message.Message):
    __slots__ = ("id", "submitBlockResponse", "getBlockTemplateResponse", "notifyBlockAddedResponse", "blockAddedNotification", "getConnectedPeerInfoResponse", "addPeerResponse", "submitTransactionResponse", "getBlockDagInfoResponse", "getUtxosByAddressesResponse", "banResponse", "unbanResponse", "getInfoResponse", "getServerInfoResponse", "getSyncStatusResponse")
    ID_FIELD_NUMBER: _ClassVar[int]
    SUBMITBLOCKRESPONSE_FIELD_NUMBER: _ClassVar[int]
    GETBLOCKTEMPLATERESPONSE_FIELD_NUMBER: _ClassVar[int]
    NOTIFYBLOCKADDEDRESPONSE_FIELD_NUMBER: _ClassVar[int]
    BLOCKADDEDNOTIFICATION_FIELD_NUMBER: _ClassVar[int]
    GETCONNECTEDPEERINFORESPONSE_FIELD_NUMBER: _ClassVar[int]
    ADDPEERRESPONSE_FIELD_NUMBER: _ClassVar[int]
    SUBMITTRANSACTIONRESPONSE_FIELD_NUMBER: _ClassVar[int]
    GETBLOCKDAGINFORESPONSE_FIELD_NUMBER: _ClassVar[int]
    GETUTXOSBYADDRESSESRESPONSE_FIELD_NUMBER: _ClassVar[int]
    BANRESPONSE_FIELD_NUMBER: _ClassVar[int]
    UNBANRESPONSE_FIELD_NUMBER: _ClassVar[int]
    GETINFORESPONSE_FIELD_NUMBER: _ClassVar[int]
    GETSERVERINFORESPONSE_FIELD_NUMBER: _ClassVar[int]
    GETSYNCSTATUSRESPONSE_FIELD_NUMBER: _ClassVar[int]
    id: int
    submitBlockResponse: SubmitBlockResponse
    getBlockTemplateResponse: GetBlockTemplateResponse
    notifyBlockAddedResponse: EmptyResponse
    blockAddedNotification: BlockAddedNotification
    getConnectedPeerInfoResponse: GetConnectedPeerInfoResponse
    addPeerResponse: EmptyResponse
    submitTransactionResponse: SubmitTransactionResponse
    getBlockDagInfoResponse: GetBlockDagInfoResponse
    getUtxosByAddressesResponse: GetUtxosByAddressesResponse
    banResponse: EmptyResponse
    unbanResponse: EmptyResponse
    getInfoResponse: GetInfoResponse
    getServerInfoResponse: GetServerInfoResponse
    getSyncStatusResponse: GetSyncStatusResponse
    def __init__(self, id: _Optional[int] = ..., submitBlockResponse: _Optional[_Union[SubmitBlockResponse, _Mapping]] = ..., getBlockTemplateResponse: _Optional[_Union[GetBlockTemplateResponse, _Mapping]] = ..., notifyBlockAddedResponse: _Optional[_Union[EmptyResponse, _Mapping]] = ..., blockAddedNotification: _Optional[_Union[BlockAddedNotification, _Mapping]] = ..., getConnectedPeerInfoResponse: _Optional[_Union[GetConnectedPeerInfoResponse, _Mapping]] = ..., addPeerResponse: _Optional[_Union[EmptyResponse, _Mapping]] = ..., submitTransactionResponse: _Optional[_Union[SubmitTransactionResponse, _Mapping]] = ..., getBlockDagInfoResponse: _Optional[_Union[GetBlockDagInfoResponse, _Mapping]] = ..., getUtxosByAddressesResponse: _Optional[_Union[GetUtxosByAddressesResponse, _Mapping]] = ..., banResponse: _Optional[_Union[EmptyResponse, _Mapping]] = ..., unbanResponse: _Optional[_Union[EmptyResponse, _Mapping]] = ..., getInfoResponse: _Optional[_Union[GetInfoResponse, _Mapping]] = ..., getServerInfoResponse: _Optional[_Union[GetServerInfoResponse, _Mapping]] = ..., getSyncStatusResponse: _Optional[_Union[GetSyncStatusResponse, _Mapping]] = ...) -> None: ...

class RpcError(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class EmptyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EmptyResponse(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: RpcError
    def __init__(self, error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class IpRequest(_message.Message):
    __slots__ = ("ip",)
    IP_FIELD_NUMBER: _ClassVar[int]
    ip: str
    def __init__(self, ip: _Optional[str] = ...) -> None: ...

class NotifyRequest(_message.Message):
    __slots__ = ("command",)
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    command: int
    def __init__(self, command: _Optional[int] = ...) -> None: ...

class AddPeerRequest(_message.Message):
    __slots__ = ("address", "isPermanent")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ISPERMANENT_FIELD_NUMBER: _ClassVar[int]
    address: str
    isPermanent: bool
    def __init__(self, address: _Optional[str] = ..., isPermanent: bool = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("p2pId", "mempoolSize", "serverVersion", "isUtxoIndexed", "isSynced", "error")
    P2PID_FIELD_NUMBER: _ClassVar[int]
    MEMPOOLSIZE_FIELD_NUMBER: _ClassVar[int]
    SERVERVERSION_FIELD_NUMBER: _ClassVar[int]
    ISUTXOINDEXED_FIELD_NUMBER: _ClassVar[int]
    ISSYNCED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    p2pId: str
    mempoolSize: int
    serverVersion: str
    isUtxoIndexed: bool
    isSynced: bool
    error: RpcError
    def __init__(self, p2pId: _Optional[str] = ..., mempoolSize: _Optional[int] = ..., serverVersion: _Optional[str] = ..., isUtxoIndexed: bool = ..., isSynced: bool = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("rpcApiVersion", "serverVersion", "networkId", "hasUtxoIndex", "isSynced", "virtualDaaScore", "error")
    RPCAPIVERSION_FIELD_NUMBER: _ClassVar[int]
    SERVERVERSION_FIELD_NUMBER: _ClassVar[int]
    NETWORKID_FIELD_NUMBER: _ClassVar[int]
    HASUTXOINDEX_FIELD_NUMBER: _ClassVar[int]
    ISSYNCED_FIELD_NUMBER: _ClassVar[int]
    VIRTUALDAASCORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    rpcApiVersion: int
    serverVersion: str
    networkId: str
    hasUtxoIndex: bool
    isSynced: bool
    virtualDaaScore: int
    error: RpcError
    def __init__(self, rpcApiVersion: _Optional[int] = ..., serverVersion: _Optional[str] = ..., networkId: _Optional[str] = ..., hasUtxoIndex: bool = ..., isSynced: bool = ..., virtualDaaScore: _Optional[int] = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class GetSyncStatusResponse(_message.Message):
    __slots__ = ("isSynced", "error")
    ISSYNCED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    isSynced: bool
    error: RpcError
    def __init__(self, isSynced: bool = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class GetConnectedPeerInfoResponse(_message.Message):
    __slots__ = ("infos", "error")
    INFOS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    infos: _containers.RepeatedCompositeFieldContainer[PeerInfo]
    error: RpcError
    def __init__(self, infos: _Optional[_Iterable[_Union[PeerInfo, _Mapping]]] = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class PeerInfo(_message.Message):
    __slots__ = ("id", "address", "lastPingDuration", "isOutbound", "userAgent", "advertisedProtocolVersion", "timeConnected", "isIbdPeer")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LASTPINGDURATION_FIELD_NUMBER: _ClassVar[int]
    ISOUTBOUND_FIELD_NUMBER: _ClassVar[int]
    USERAGENT_FIELD_NUMBER: _ClassVar[int]
    ADVERTISEDPROTOCOLVERSION_FIELD_NUMBER: _ClassVar[int]
    TIMECONNECTED_FIELD_NUMBER: _ClassVar[int]
    ISIBDPEER_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    lastPingDuration: int
    isOutbound: bool
    userAgent: str
    advertisedProtocolVersion: int
    timeConnected: int
    isIbdPeer: bool
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., lastPingDuration: _Optional[int] = ..., isOutbound: bool = ..., userAgent: _Optional[str] = ..., advertisedProtocolVersion: _Optional[int] = ..., timeConnected: _Optional[int] = ..., isIbdPeer: bool = ...) -> None: ...

class GetBlockDagInfoResponse(_message.Message):
    __slots__ = ("networkName", "blockCount", "headerCount", "tipHashes", "difficulty", "pastMedianTime", "virtualParentHashes", "pruningPointHash", "virtualDaaScore", "sink", "error")
    NETWORKNAME_FIELD_NUMBER: _ClassVar[int]
    BLOCKCOUNT_FIELD_NUMBER: _ClassVar[int]
    HEADERCOUNT_FIELD_NUMBER: _ClassVar[int]
    TIPHASHES_FIELD_NUMBER: _ClassVar[int]
    DIFFICULTY_FIELD_NUMBER: _ClassVar[int]
    PASTMEDIANTIME_FIELD_NUMBER: _ClassVar[int]
    VIRTUALPARENTHASHES_FIELD_NUMBER: _ClassVar[int]
    PRUNINGPOINTHASH_FIELD_NUMBER: _ClassVar[int]
    VIRTUALDAASCORE_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    networkName: str
    blockCount: int
    headerCount: int
    tipHashes: _containers.RepeatedScalarFieldContainer[str]
    difficulty: float
    pastMedianTime: int
    virtualParentHashes: _containers.RepeatedScalarFieldContainer[str]
    pruningPointHash: str
    virtualDaaScore: int
    sink: str
    error: RpcError
    def __init__(self, networkName: _Optional[str] = ..., blockCount: _Optional[int] = ..., headerCount: _Optional[int] = ..., tipHashes: _Optional[_Iterable[str]] = ..., difficulty: _Optional[float] = ..., pastMedianTime: _Optional[int] = ..., virtualParentHashes: _Optional[_Iterable[str]] = ..., pruningPointHash: _Optional[str] = ..., virtualDaaScore: _Optional[int] = ..., sink: _Optional[str] = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class GetBlockTemplateRequest(_message.Message):
    __slots__ = ("payAddress", "extraData")
    PAYADDRESS_FIELD_NUMBER: _ClassVar[int]
    EXTRADATA_FIELD_NUMBER: _ClassVar[int]
    payAddress: str
    extraData: str
    def __init__(self, payAddress: _Optional[str] = ..., extraData: _Optional[str] = ...) -> None: ...

class GetBlockTemplateResponse(_message.Message):
    __slots__ = ("isSynced", "block", "error")
    ISSYNCED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    isSynced: bool
    block: RpcBlock
    error: RpcError
    def __init__(self, isSynced: bool = ..., block: _Optional[_Union[RpcBlock, _Mapping]] = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class SubmitBlockRequest(_message.Message):
    __slots__ = ("block", "allowNonDAABlocks")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    ALLOWNONDAABLOCKS_FIELD_NUMBER: _ClassVar[int]
    block: RpcBlock
    allowNonDAABlocks: bool
    def __init__(self, block: _Optional[_Union[RpcBlock, _Mapping]] = ..., allowNonDAABlocks: bool = ...) -> None: ...

class SubmitBlockResponse(_message.Message):
    __slots__ = ("rejectReason", "error")
    REJECTREASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    rejectReason: int
    error: RpcError
    def __init__(self, rejectReason: _Optional[int] = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class BlockAddedNotification(_message.Message):
    __slots__ = ("block",)
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    block: RpcBlock
    def __init__(self, block: _Optional[_Union[RpcBlock, _Mapping]] = ...) -> None: ...

class SubmitTransactionRequest(_message.Message):
    __slots__ = ("transaction", "allowOrphan")
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    ALLOWORPHAN_FIELD_NUMBER: _ClassVar[int]
    transaction: RpcTransaction
    allowOrphan: bool
    def __init__(self, transaction: _Optional[_Union[RpcTransaction, _Mapping]] = ..., allowOrphan: bool = ...) -> None: ...

class SubmitTransactionResponse(_message.Message):
    __slots__ = ("transactionId", "error")
    TRANSACTIONID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    transactionId: str
    error: RpcError
    def __init__(self, transactionId: _Optional[str] = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class GetUtxosByAddressesRequest(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class GetUtxosByAddressesResponse(_message.Message):
    __slots__ = ("entries", "error")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[RpcUtxosByAddressesEntry]
    error: RpcError
    def __init__(self, entries: _Optional[_Iterable[_Union[RpcUtxosByAddressesEntry, _Mapping]]] = ..., error: _Optional[_Union[RpcError, _Mapping]] = ...) -> None: ...

class RpcUtxosByAddressesEntry(_message.Message):
    __slots__ = ("address", "outpoint", "utxoEntry")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    OUTPOINT_FIELD_NUMBER: _ClassVar[int]
    UTXOENTRY_FIELD_NUMBER: _ClassVar[int]
    address: str
    outpoint: RpcOutpoint
    utxoEntry: RpcUtxoEntry
    def __init__(self, address: _Optional[str] = ..., outpoint: _Optional[_Union[RpcOutpoint, _Mapping]] = ..., utxoEntry: _Optional[_Union[RpcUtxoEntry, _Mapping]] = ...) -> None: ...

class RpcUtxoEntry(_message.Message):
    __slots__ = ("amount", "scriptPublicKey", "blockDaaScore", "isCoinbase")
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    SCRIPTPUBLICKEY_FIELD_NUMBER: _ClassVar[int]
    BLOCKDAASCORE_FIELD_NUMBER: _ClassVar[int]
    ISCOINBASE_FIELD_NUMBER: _ClassVar[int]
    amount: int
    scriptPublicKey: RpcScriptPublicKey
    blockDaaScore: int
    isCoinbase: bool
    def __init__(self, amount: _Optional[int] = ..., scriptPublicKey: _Optional[_Union[RpcScriptPublicKey, _Mapping]] = ..., blockDaaScore: _Optional[int] = ..., isCoinbase: bool = ...) -> None: ...

class RpcBlock(_message.Message):
    __slots__ = ("header", "transactions", "verboseData")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TRANSACTIONS_FIELD_NUMBER: _ClassVar[int]
    VERBOSEDATA_FIELD_NUMBER: _ClassVar[int]
    header: RpcBlockHeader
    transactions: _containers.RepeatedCompositeFieldContainer[RpcTransaction]
    verboseData: RpcBlockVerboseData
    def __init__(self, header: _Optional[_Union[RpcBlockHeader, _Mapping]] = ..., transactions: _Optional[_Iterable[_Union[RpcTransaction, _Mapping]]] = ..., verboseData: _Optional[_Union[RpcBlockVerboseData, _Mapping]] = ...) -> None: ...

class RpcBlockHeader(_message.Message):
    __slots__ = ("version", "hashMerkleRoot", "acceptedIdMerkleRoot", "utxoCommitment", "timestamp", "bits", "nonce", "daaScore", "blueWork", "parents", "blueScore", "pruningPoint", "hash")
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
    HASH_FIELD_NUMBER: _ClassVar[int]
    version: int
    hashMerkleRoot: str
    acceptedIdMerkleRoot: str
    utxoCommitment: str
    timestamp: int
    bits: int
    nonce: int
    daaScore: int
    blueWork: str
    parents: _containers.RepeatedCompositeFieldContainer[RpcBlockLevelParents]
    blueScore: int
    pruningPoint: str
    hash: str
    def __init__(self, version: _Optional[int] = ..., hashMerkleRoot: _Optional[str] = ..., acceptedIdMerkleRoot: _Optional[str] = ..., utxoCommitment: _Optional[str] = ..., timestamp: _Optional[int] = ..., bits: _Optional[int] = ..., nonce: _Optional[int] = ..., daaScore: _Optional[int] = ..., blueWork: _Optional[str] = ..., parents: _Optional[_Iterable[_Union[RpcBlockLevelParents, _Mapping]]] = ..., blueScore: _Optional[int] = ..., pruningPoint: _Optional[str] = ..., hash: _Optional[str] = ...) -> None: ...

class RpcBlockLevelParents(_message.Message):
    __slots__ = ("parentHashes",)
    PARENTHASHES_FIELD_NUMBER: _ClassVar[int]
    parentHashes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, parentHashes: _Optional[_Iterable[str]] = ...) -> None: ...

class RpcBlockVerboseData(_message.Message):
    __slots__ = ("hash", "selectedParentHash", "isHeaderOnly", "blueScore")
    HASH_FIELD_NUMBER: _ClassVar[int]
    SELECTEDPARENTHASH_FIELD_NUMBER: _ClassVar[int]
    ISHEADERONLY_FIELD_NUMBER: _ClassVar[int]
    BLUESCORE_FIELD_NUMBER: _ClassVar[int]
    hash: str
    selectedParentHash: str
    isHeaderOnly: bool
    blueScore: int
    def __init__(self, hash: _Optional[str] = ..., selectedParentHash: _Optional[str] = ..., isHeaderOnly: bool = ..., blueScore: _Optional[int] = ...) -> None: ...

class RpcTransaction(_message.Message):
    __slots__ = ("version", "inputs", "outputs", "lockTime", "subnetworkId", "gas", "payload", "storage_mass")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOCKTIME_FIELD_NUMBER: _ClassVar[int]
    SUBNETWORKID_FIELD_NUMBER: _ClassVar[int]
    GAS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    STORAGE_MASS_FIELD_NUMBER: _ClassVar[int]
    version: int
    inputs: _containers.RepeatedCompositeFieldContainer[RpcTransactionInput]
    outputs: _containers.RepeatedCompositeFieldContainer[RpcTransactionOutput]
    lockTime: int
    subnetworkId: str
    gas: int
    payload: str
    storage_mass: int
    def __init__(self, version: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[RpcTransactionInput, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[RpcTransactionOutput, _Mapping]]] = ..., lockTime: _Optional[int] = ..., subnetworkId: _Optional[str] = ..., gas: _Optional[int] = ..., payload: _Optional[str] = ..., storage_mass: _Optional[int] = ...) -> None: ...

class RpcTransactionInput(_message.Message):
    __slots__ = ("previousOutpoint", "signatureScript", "sequence", "sigOpCount", "computeBudget")
    PREVIOUSOUTPOINT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURESCRIPT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SIGOPCOUNT_FIELD_NUMBER: _ClassVar[int]
    COMPUTEBUDGET_FIELD_NUMBER: _ClassVar[int]
    previousOutpoint: RpcOutpoint
    signatureScript: str
    sequence: int
    sigOpCount: int
    computeBudget: int
    def __init__(self, previousOutpoint: _Optional[_Union[RpcOutpoint, _Mapping]] = ..., signatureScript: _Optional[str] = ..., sequence: _Optional[int] = ..., sigOpCount: _Optional[int] = ..., computeBudget: _Optional[int] = ...) -> None: ...

class RpcTransactionOutput(_message.Message):
    __slots__ = ("amount", "scriptPublicKey")
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    SCRIPTPUBLICKEY_FIELD_NUMBER: _ClassVar[int]
    amount: int
    scriptPublicKey: RpcScriptPublicKey
    def __init__(self, amount: _Optional[int] = ..., scriptPublicKey: _Optional[_Union[RpcScriptPublicKey, _Mapping]] = ...) -> None: ...

class RpcScriptPublicKey(_message.Message):
    __slots__ = ("version", "scriptPublicKey")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SCRIPTPUBLICKEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    scriptPublicKey: str
    def __init__(self, version: _Optional[int] = ..., scriptPublicKey: _Optional[str] = ...) -> None: ...

class RpcOutpoint(_message.Message):
    __slots__ = ("transactionId", "index")
    TRANSACTIONID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    transactionId: str
    index: int
    def __init__(self, transactionId: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...
