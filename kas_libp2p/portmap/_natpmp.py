"""NAT-PMP's messages (RFC 6886): the outside address, and TCP mappings. No I/O."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from kas_libp2p.portmap._keeper import Answer

VERSION = 0
ADDRESS, MAP_TCP = 0, 2
RESPONSE = 0x80

_HEADER = struct.Struct("!BBHI")
_ADDRESS = struct.Struct("!4s")
_MAP = struct.Struct("!HHI")

_UNSUPPORTED_VERSION = 1
_REFUSALS = {
    2: "does not allow us a port: NAT-PMP is switched off in its settings",
    3: "has no connection to the internet",
    4: "has no more ports to give",
}


@dataclass(frozen=True, slots=True)
class NatPmp:
    """NAT-PMP."""

    name: str = "nat-pmp"
    first_pause: float = 0.25  # section 3.1
    tries: int = 4
    tells_address: bool = True

    def map_request(self, port: int, nonce: bytes, external: int, address: str | None, lifetime: int) -> bytes:
        """See `Codec`."""
        return struct.pack("!BBHHHI", VERSION, MAP_TCP, 0, port, external, lifetime)

    def check_request(self) -> bytes:
        """See `Codec`."""
        return bytes((VERSION, ADDRESS))

    def read(self, data: bytes) -> Answer | None:
        """See `Codec`."""
        if len(data) < 4 or not data[1] & RESPONSE:
            return None
        if data[0] != VERSION:  # a PCP router that speaks nothing else says so in its own version
            return Answer(0, unsupported=True) if data[0] == 2 and data[3] == _UNSUPPORTED_VERSION else None
        if len(data) < _HEADER.size:
            return None
        _, opcode, result, epoch = _HEADER.unpack_from(data)
        refused = _REFUSALS.get(result, f"answered with error {result}") if result else ""
        if result == _UNSUPPORTED_VERSION:
            return Answer(epoch, unsupported=True)
        body = data[_HEADER.size :]
        if opcode == RESPONSE | ADDRESS:
            if refused:
                return Answer(epoch, refused=refused)
            return Answer(epoch, address=_ip(body)) if len(body) >= _ADDRESS.size else None
        if opcode != RESPONSE | MAP_TCP or len(body) < _MAP.size:
            return None
        port, external, lifetime = _MAP.unpack_from(body)
        return Answer(epoch, refused=refused, port=port, external=external, lifetime=lifetime) if port else None


def _ip(body: bytes) -> str:
    return str(ipaddress.IPv4Address(_ADDRESS.unpack_from(body)[0]))
