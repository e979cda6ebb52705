"""PCP's messages (RFC 6887): MAP for TCP, and ANNOUNCE. No I/O.

Over IPv4 MAP gives a port of the router's; over IPv6, where nothing is translated, it opens a port of ours in the
router's firewall (section 2.2).
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from kas_libp2p.portmap._keeper import Answer

VERSION = 2
ANNOUNCE, MAP = 0, 1
RESPONSE = 0x80
TCP = 6
MAX_MESSAGE = 1100
"""Bytes (section 7)."""

_HEADER = struct.Struct("!BBxBII12x")
_MAP = struct.Struct("!12sB3xHH16s")
_ANY, _ANY6 = "0.0.0.0", "::"  # noqa: S104 - no address is bound here: it says that any will do

_UNSUPPORTED_VERSION = 1
_REFUSALS = {
    2: "does not allow us a port (NOT_AUTHORIZED)",
    7: "has no connection to the internet (NETWORK_FAILURE)",
    8: "has no more ports to give (NO_RESOURCES)",
    10: "gives us no more ports (USER_EX_QUOTA)",
    11: "can't give this port (CANNOT_PROVIDE_EXTERNAL)",
    12: "sees us at another address: there is a NAT between us and it (ADDRESS_MISMATCH)",
}


@dataclass(frozen=True, slots=True)
class Pcp:
    """PCP, for one client.

    Attributes:
        client: our address towards the router: an IPv4 one, or the IPv6 one that its firewall is to be opened for.
    """

    client: str
    name: str = "pcp"
    first_pause: float = 3.0  # IRT, section 8.1.1
    tries: int = 2
    tells_address: bool = False

    def map_request(self, port: int, nonce: bytes, external: int, address: str | None, lifetime: int) -> bytes:
        """See `Codec`."""
        body = _MAP.pack(nonce, TCP, port, external, _packed(address or (_ANY6 if ":" in self.client else _ANY)))
        return self._header(MAP, lifetime) + body

    def check_request(self) -> bytes:
        """See `Codec`."""
        return self._header(ANNOUNCE, 0)

    def _header(self, opcode: int, lifetime: int) -> bytes:
        return struct.pack("!BB2xI16s", VERSION, opcode, lifetime, _packed(self.client))

    def read(self, data: bytes) -> Answer | None:
        """See `Codec`."""
        if len(data) < 4 or not data[1] & RESPONSE:
            return None
        if data[0] != VERSION:
            # What speaks NAT-PMP alone answers in its own version (RFC 6887 appendix A).
            return Answer(0, unsupported=True) if data[0] == 0 and data[3] == _UNSUPPORTED_VERSION else None
        if not _HEADER.size <= len(data) <= MAX_MESSAGE or len(data) % 4:
            return None
        _, opcode, result, lifetime, epoch = _HEADER.unpack_from(data)
        if result == _UNSUPPORTED_VERSION:
            return Answer(epoch, unsupported=True)
        if opcode == RESPONSE | ANNOUNCE:
            return Answer(epoch, refused=_refusal(result))
        if opcode != RESPONSE | MAP or len(data) < _HEADER.size + _MAP.size:
            return None
        nonce, protocol, port, external, where = _MAP.unpack_from(data, _HEADER.size)
        outside = ipaddress.IPv6Address(where)
        found = outside.ipv4_mapped
        if protocol != TCP or not port or ((found is None) != (":" in self.client) and not result):
            return None
        return Answer(
            epoch,
            refused=_refusal(result),
            port=port,
            nonce=nonce,
            address=str(found or outside),
            external=external,
            lifetime=lifetime,
        )


def _refusal(result: int) -> str:
    return _REFUSALS.get(result, f"answered with error {result}") if result else ""


def _packed(ip: str) -> bytes:
    return ipaddress.IPv6Address(ip if ":" in ip else f"::ffff:{ip}").packed
