"""Pure facts about multiaddrs and peer ids: whose, where, how far it reaches, through which relay.

Every function takes a ``Multiaddr`` or its text, and is total: what it can't make sense of raises `AddressError`,
whatever the bytes, since most addresses come from peers. Nothing here resolves a name or touches a socket.

Peer ids are kept as base58btc text (`PeerId`), in which two ids are equal exactly if their texts are. An address is
kept in one form too: `parse` turns ``/ipfs`` and ids in CID form into ``/p2p`` with base58.

The components are read here rather than by ``Multiaddr.items()``: multiaddr 0.2 takes ``ip6zone`` for a component
without a value when it iterates, and accepts a value that is cut short.

Sources: multiformats/multiaddr, libp2p/specs ``addressing`` and ``peer-ids``, RFC 4007 section 11 (zones), RFC 6761.
"""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

import base58
from multiaddr import Multiaddr
from multiaddr.codecs import codec_by_name
from multiaddr.exceptions import ProtocolNotFoundError
from multiaddr.protocols import REGISTRY

from kas_libp2p.errors import AddressError
from kas_libp2p.metadata import PeerId

Address: TypeAlias = Multiaddr | str
"""A multiaddr, or its text."""

Component: TypeAlias = tuple[str, str | None]
"""Protocol name and value, as ``("tcp", "16111")`` or ``("p2p-circuit", None)``."""

MAX_ADDRESS_LENGTH = 1024
"""Bytes or characters of one address: a circuit address with two names of 255 and two peer ids has about 700."""

LEAST_PORT = 1024
"""Least port that is dialed on somebody else's word, or guessed. Below are well-known services: no peer listens there,
no NAT gives such a port to a connection from a higher one, and a stranger's SYN looks like an attack."""

RECENT = 64
"""Addresses and peer ids whose other form is kept: a dial reads the same few again and again, some ten times each."""

MAX_PEER_ID_LENGTH = 128
"""Characters of one peer id: base58 of the 42 bytes an inline key may have needs 60, in CID form 73."""

_INLINE_KEY_LIMIT = 42
"""Bytes of a key that is in the id itself rather than its hash (specs ``peer-ids``)."""

_IDENTITY, _SHA256 = 0x00, 0x12
_CID_V1, _LIBP2P_KEY = 0x01, 0x72
_P2P_CODE = 0x01A5

_IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAMES = frozenset({"dns", "dns4", "dns6", "dnsaddr"})
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments; some count as global in newer Pythons, none is a host
        "192.88.99.0/24",  # 6to4 relay anycast, RFC 7526
        "224.0.0.0/4",  # multicast, which ipaddress calls global
        "2001::/23",  # Teredo, ORCHID
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation, RFC 9637
    )
)
_SITE = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",  # behind a carrier's NAT, RFC 6598
        "169.254.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
)
_SPECIAL_USE = ("localhost", "local", "internal", "invalid", "test", "example", "onion", "alt", "home.arpa", "lan")
"""Names that no public resolver answers: RFC 6761, 6762, 7686, 8375, 9476, and ``lan`` as routers use it."""


# Peer ids


@functools.lru_cache(RECENT)
def parse_peer_id(text: str) -> PeerId:
    """Read a peer id: base58btc (``12D3KooW…``, ``Qm…``), or a CIDv1 in base32, base36 or base58btc (``bafz…``).

    Raises:
        AddressError: it is none; the text says why.
    """
    if not text or len(text) > MAX_PEER_ID_LENGTH or not text.isascii():
        raise AddressError(f"{_short(text)} is no peer id")
    try:
        return peer_id_from_bytes(_peer_id_bytes(text))
    except ValueError as error:
        raise AddressError(f"{_short(text)} is no peer id: {_reason(error)}") from None


@functools.lru_cache(RECENT)
def peer_id_from_bytes(data: bytes) -> PeerId:
    """The peer id with this multihash, as it stands in protobuf fields.

    Raises:
        AddressError: not a multihash that a peer id may be: SHA-256, or an inline key of at most 42 bytes.
    """
    if len(data) < 2 or len(data) != 2 + data[1]:
        raise AddressError("a peer id is a multihash, and this is none")
    if data[0] == _SHA256 and data[1] != 32:
        raise AddressError("a SHA-256 peer id has 32 bytes")
    if data[0] == _IDENTITY and not 0 < data[1] <= _INLINE_KEY_LIMIT:
        raise AddressError(f"a key inside a peer id has at most {_INLINE_KEY_LIMIT} bytes")
    if data[0] not in (_IDENTITY, _SHA256):
        raise AddressError(f"a peer id is SHA-256 or an inline key, not hash {data[0]:#x}")
    return PeerId(base58.b58encode(data).decode("ascii"))


def peer_id_to_bytes(peer: str) -> bytes:
    """The multihash of a peer id, as protobuf fields carry it.

    Raises:
        AddressError: no peer id.
    """
    return base58.b58decode(parse_peer_id(peer))


def peer_id_to_cid(peer: str) -> str:
    """The peer id as a CIDv1 in base32 (``bafz…``), the form that DNS labels and newer tools use."""
    data = bytes((_CID_V1, _LIBP2P_KEY)) + peer_id_to_bytes(peer)
    return "b" + base64.b32encode(data).decode("ascii").rstrip("=").lower()


def _peer_id_bytes(text: str) -> bytes:
    if text.startswith(("1", "Qm")):
        return base58.b58decode(text)
    match text[0]:
        case "b" | "B":
            body = text[1:].upper()
            data = base64.b32decode(body + "=" * (-len(body) % 8))
        case "k" | "K":
            number = int(text[1:], 36)
            data = number.to_bytes((number.bit_length() + 7) // 8, "big")
        case "z":
            data = base58.b58decode(text[1:])
        case _:
            raise AddressError("neither base58 nor a CID")
    if data[:2] != bytes((_CID_V1, _LIBP2P_KEY)):
        raise AddressError("the CID is not of a libp2p key")
    return data[2:]


# Multiaddrs


def parse(address: Address | bytes) -> Multiaddr:
    """Read a multiaddr from text or bytes, check every component, and bring it into its one form.

    Raises:
        AddressError: no multiaddr; the text says why.
    """
    if isinstance(address, str):
        return _from_text(address)
    data = bytes(address)
    return Multiaddr(_encode(_decode(data)))


def components(address: Address) -> tuple[Component, ...]:
    """The address as pairs of protocol name and value.

    Raises:
        AddressError: no multiaddr.
    """
    return _decode(bytes(_from_text(address) if isinstance(address, str) else address))


def join(parts: Iterable[Component]) -> Multiaddr:
    """The address with these components.

    Raises:
        AddressError: one of them is none.
    """
    return Multiaddr(_encode(tuple(parts)))


@functools.lru_cache(RECENT)
def text_of(address: Multiaddr) -> str:
    """The address as text. ``str`` gives the same, and works it out anew each time."""
    return str(address)


@functools.lru_cache(RECENT)
def _from_text(text: str) -> Multiaddr:
    if len(text) > MAX_ADDRESS_LENGTH:
        raise AddressError(f"{_short(text)} is no multiaddr: longer than {MAX_ADDRESS_LENGTH} characters")
    if not text.startswith("/") or text == "/":
        raise AddressError(f"{_short(text)} is no multiaddr: one looks like /ip4/192.0.2.1/tcp/16111")
    try:
        data = _encode(_pairs(text.removesuffix("/").split("/")[1:]))
        _decode(data)
    except AddressError as error:
        raise AddressError(f"{_short(text)} is no multiaddr: {error}") from None
    return Multiaddr(data)


def _pairs(parts: list[str]) -> tuple[Component, ...]:
    pairs: list[Component] = []
    rest = iter(parts)
    for part in rest:
        name = "p2p" if part == "ipfs" else part
        try:
            protocol = REGISTRY.find_by_name(name)
        except ProtocolNotFoundError:
            raise AddressError(f"no protocol is called {_short(name)}" if name else "a part is empty") from None
        if protocol.codec is None:
            pairs.append((name, None))
            continue
        value = "/".join(rest) if protocol.path else next(rest, "")
        if not value:
            raise AddressError(f"/{name} lacks its value")
        pairs.append((name, value))
    return tuple(pairs)


@functools.lru_cache(RECENT)
def _encode(pairs: tuple[Component, ...]) -> bytes:
    return b"".join(_encode_component(name, value) for name, value in pairs)


def _encode_component(name: str, value: str | None) -> bytes:
    if name == "p2p" and value is not None:
        peer = peer_id_to_bytes(value)
        return _varint(_P2P_CODE) + _varint(len(peer)) + peer
    if name in ("tcp", "udp") and not (value and value.isascii() and value.isdigit() and int(value[:6]) <= 0xFFFF):
        raise AddressError(f"{_short(value)} is no port: 0 to 65535")
    try:
        return bytes(Multiaddr(f"/{name}" if value is None else f"/{name}/{value}"))
    except ValueError:
        raise AddressError(f"{_short(value)} is no value for /{name}") from None


@functools.lru_cache(maxsize=1024)
def _decode(data: bytes) -> tuple[Component, ...]:
    if not data or len(data) > MAX_ADDRESS_LENGTH:
        raise AddressError(f"a multiaddr has 1 to {MAX_ADDRESS_LENGTH} bytes, not {len(data)}")
    pairs: list[Component] = []
    position = 0
    while position < len(data):
        start = position
        code, position = _read_varint(data, position)
        try:
            protocol = REGISTRY.find_by_code(code)
        except ProtocolNotFoundError:
            raise AddressError(f"protocol {code:#x} is unknown") from None
        if protocol.codec is None:
            pairs.append((protocol.name, None))
            continue
        size = codec_by_name(protocol.codec).SIZE // 8
        if size <= 0:
            size, position = _read_varint(data, position)
        if not size or position + size > len(data):
            raise AddressError(f"/{protocol.name} is cut short")
        position += size
        pairs.append((protocol.name, _decode_value(protocol.name, data[start:position], size)))
    return tuple(pairs)


def _decode_value(name: str, component: bytes, size: int) -> str:
    if name == "p2p":
        return peer_id_from_bytes(component[-size:].removeprefix(bytes((_CID_V1, _LIBP2P_KEY))))
    try:
        return str(Multiaddr(component)).removeprefix(f"/{name}/")
    except ValueError:
        raise AddressError(f"/{name} has a bad value") from None


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[position : position + 4]):  # the largest protocol code has three bytes
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise AddressError("a multiaddr is cut short, or holds an endless number")


# Whose


def peer_of(address: Address) -> PeerId | None:
    """The peer that the address leads to: its last component, if that is ``/p2p``.

    The relay of a circuit address that names no target is not it.
    """
    name, value = components(address)[-1]
    return PeerId(value) if name == "p2p" and value is not None else None


def without_peer(address: Address) -> Multiaddr:
    """The address without the ``/p2p`` at its end, if there is one.

    Raises:
        AddressError: no multiaddr, or nothing is left of it.
    """
    pairs = components(address)
    if pairs[-1][0] != "p2p":
        return parse(address)
    if len(pairs) == 1:
        raise AddressError(f"{address} is a peer id alone, there is no address in it")
    return Multiaddr(_encode(pairs[:-1]))


def with_peer(address: Address, peer: str) -> Multiaddr:
    """The address with ``/p2p/<peer>`` at its end.

    Raises:
        AddressError: no multiaddr, no peer id, or the address belongs to another peer.
    """
    peer = parse_peer_id(peer)
    owner = peer_of(address)
    if owner is not None and owner != peer:
        raise AddressError(f"{address} is an address of another peer than {peer}")
    pairs = components(address)
    return Multiaddr(_encode(pairs if owner else (*pairs, ("p2p", peer))))


def is_relayed(address: Address) -> bool:
    """Whether the address goes through a relay (``/p2p-circuit``)."""
    return any(name == "p2p-circuit" for name, _ in components(address))


def relay_of(address: Address) -> PeerId | None:
    """The relay of a circuit address; ``None`` if it is not relayed or does not name the relay."""
    relay = relay_address(address)
    return None if relay is None else peer_of(relay)


def relay_address(address: Address) -> Multiaddr | None:
    """What stands before the last ``/p2p-circuit``: the way to the relay; ``None`` if nothing does."""
    pairs = components(address)
    for index in range(len(pairs) - 1, 0, -1):
        if pairs[index][0] == "p2p-circuit":
            return Multiaddr(_encode(pairs[:index]))
    return None


def name_of(address: Address) -> Component | None:
    """The ``/dns``, ``/dns4``, ``/dns6`` or ``/dnsaddr`` that the address starts with; ``None`` if there is none."""
    name, value = components(address)[0]
    return (name, value) if name in _NAMES else None


# Where


def ip_port(address: Address) -> tuple[str, int] | None:
    """IP and TCP port at which plain TCP reaches the address, a zone behind ``%``; ``None`` for every other address.

    That is exactly ``[/ip6zone/…]/ip4|ip6/…/tcp/…[/p2p/…]``. A circuit, WebSocket or QUIC address has none.
    """
    pairs = components(address)
    if pairs[-1][0] == "p2p":
        pairs = pairs[:-1]
    zone = ""
    if len(pairs) == 3 and pairs[0][0] == "ip6zone" and pairs[1][0] == "ip6":
        zone = f"%{pairs[0][1]}"
        pairs = pairs[1:]
    match pairs:
        case (("ip4" | "ip6", str(ip)), ("tcp", str(port))):
            return ip + zone, int(port)
    return None


def from_ip_port(ip: str, port: int) -> Multiaddr:
    """``/ip4/…/tcp/…`` or ``/ip6/…/tcp/…``. A zone may follow the IP behind ``%``; a mapped IPv4 address becomes IPv4.

    Raises:
        AddressError: no IP address, or a port outside 0 to 65535.
    """
    return join((*ip_components(ip), ("tcp", str(_port(port)))))


def ip_components(ip: str) -> tuple[Component, ...]:
    """The components of an IP: ``/ip4``, ``/ip6``, or ``/ip6zone`` and ``/ip6``; a mapped IPv4 address becomes IPv4.

    Raises:
        AddressError: no IP address.
    """
    where = _unmapped(_ip(ip))
    if where.version == 4:
        return (("ip4", str(where)),)
    plain, _, zone = str(where).partition("%")
    return (("ip6zone", zone), ("ip6", plain)) if zone else (("ip6", plain),)


def ip_port_text(ip: str, port: int) -> str:
    """As `from_ip_port`, as text and quickly, for what a socket said itself: nothing is checked."""
    ip, _, zone = ip.partition("%")
    if ":" not in ip:
        return f"/ip4/{ip}/tcp/{port}"
    return (f"/ip6zone/{zone}" if zone else "") + f"/ip6/{ip}/tcp/{port}"


def family(address: Address) -> Literal[4, 6] | None:
    """The IP version of the first hop; ``None`` if the address does not tell (``/dns``, ``/dnsaddr``, a peer id)."""
    for name, _ in components(address)[:2]:
        match name:
            case "ip4" | "dns4":
                return 4
            case "ip6" | "dns6":
                return 6
            case "ip6zone":
                continue
        break
    return None


def is_public(address: Address) -> bool:
    """Whether the first hop can be reached from the whole internet. ``address`` may also be an IP as text.

    More than ``is_global`` of the module ipaddress, and the same in every Python: multicast, 6to4, Teredo and mapped
    IPv4 addresses are not public; in IPv6 only 2000::/3 is. A name counts as public unless of special use (RFC 6761).
    """
    where = _first_hop(address)
    if where is None:
        return False
    if isinstance(where, str):
        return "." in where and not _ends_in(where, _SPECIAL_USE)
    if where.version == 6 and where not in _GLOBAL_V6:
        return False
    return where.is_global and not _is_in(where, _NOT_PUBLIC)


def is_loopback(address: Address) -> bool:
    """Whether the first hop is this machine: 127.0.0.0/8 (mapped too), ::1, or a ``localhost`` name."""
    where = _first_hop(address)
    if where is None:
        return False
    if isinstance(where, str):
        return _ends_in(where, ("localhost",))
    return _unmapped(where).is_loopback


def is_private(address: Address) -> bool:
    """Whether the first hop is an IP that means something inside one site only.

    RFC 1918, carrier NAT (100.64.0.0/10), link-local and unique local addresses. Loopback and wildcards are not.
    """
    where = _first_hop(address)
    return where is not None and not isinstance(where, str) and _is_in(_unmapped(where), _SITE)


def is_wildcard(address: Address) -> bool:
    """Whether the first hop is 0.0.0.0 or ::."""
    where = _first_hop(address)
    return where is not None and not isinstance(where, str) and where.is_unspecified


def is_multicast(address: Address) -> bool:
    """Whether the first hop is a multicast group."""
    where = _first_hop(address)
    return where is not None and not isinstance(where, str) and _unmapped(where).is_multicast


def is_link_local(address: Address) -> bool:
    """Whether the first hop is 169.254.0.0/16 or fe80::/10, which mean something on one link only."""
    where = _first_hop(address)
    return where is not None and not isinstance(where, str) and _unmapped(where).is_link_local


def subnet_key(ip: str) -> str:
    """What counts as one host for limits: an IPv4 address whole, of an IPv6 address its /64. Takes a multiaddr too.

    Raises:
        AddressError: no IP address.
    """
    where = _first_hop(ip)
    if where is None or isinstance(where, str):
        raise AddressError(f"{_short(ip)} holds no IP address")
    where = _unmapped(where)
    if where.version == 4:
        return str(where)
    return str(ipaddress.IPv6Network((int(where) >> 64 << 64, 64)))


def site_of(address: Address) -> str:
    """The network in which a private address of ours most likely is: its /24, or /64, as ``192.168.1.0/24``.

    Raises:
        AddressError: it holds no IP.
    """
    where = ip_port(address)
    if where is None:
        raise AddressError(f"{_short(address)} holds no IP address")
    ip = _ip(where[0])
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 64), strict=False))


def network_key(ip: str) -> str:
    """What counts as one network for limits and for independence: an IPv4 /16 or an IPv6 /48. Takes a multiaddr too.

    Raises:
        AddressError: no IP address.
    """
    where = _first_hop(ip)
    if where is None or isinstance(where, str):
        raise AddressError(f"{_short(ip)} holds no IP address")
    where = _unmapped(where)
    if where.version == 4:
        return str(ipaddress.IPv4Network((int(where) >> 16 << 16, 16)))
    return str(ipaddress.IPv6Network((int(where) >> 80 << 80, 48)))


def _first_hop(address: Address) -> _IPAddress | str | None:
    """The IP, or the lower-case name, of the first hop; ``None`` where there is neither."""
    if isinstance(address, str) and not address.startswith("/"):
        return _ip(address)
    for name, value in components(address)[:2]:
        if name in ("ip4", "ip6") and value is not None:
            return ipaddress.ip_address(value)
        if name in _NAMES and value is not None:
            return value.lower().rstrip(".")
        if name != "ip6zone":
            break
    return None


def _ip(text: str) -> _IPAddress:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise AddressError(f"{_short(text)} is no IP address") from None


def _unmapped(where: _IPAddress) -> _IPAddress:
    return (where.ipv4_mapped or where) if isinstance(where, ipaddress.IPv6Address) else where


def _is_in(where: _IPAddress, networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> bool:
    return any(where in network for network in networks)


def _ends_in(name: str, domains: tuple[str, ...]) -> bool:
    return any(name == domain or name.endswith("." + domain) for domain in domains)


def _port(port: int) -> int:
    if not 0 <= port <= 0xFFFF:
        raise AddressError(f"{port} is no port: 0 to 65535")
    return port


# Targets


class TargetKind(StrEnum):
    """What a user typed to say whom to connect to."""

    MULTIADDR = "multiaddr"
    """An overlay address. Never reached by plain TCP instead."""
    PEER = "peer"
    """A peer id alone; its addresses must be known from elsewhere."""
    HOST = "host"
    """``ip:port`` or ``host:port``, as Kaspa nodes write it. Says nothing of the overlay."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to connect to.

    Attributes:
        kind: which of the three forms it was.
        text: the target in its one form.
        peer: the peer id, if the target names one.
        address: the multiaddr, made of ``ip:port`` and ``host:port`` too (``/ip4``, ``/ip6``, ``/dns``); ``None`` for
            a peer id alone.
    """

    kind: TargetKind
    text: str
    peer: PeerId | None
    address: Multiaddr | None

    def __str__(self) -> str:
        return self.text


def parse_target(text: str) -> Target:
    """Read whom to connect to: a multiaddr, a peer id, ``ip:port``, ``[ipv6]:port`` or ``host:port``.

    Raises:
        AddressError: none of these; the text says what is missing.
    """
    text = text.strip()
    if text.startswith("/"):
        address = parse(text)
        peer = peer_of(address)
        if peer is not None and len(components(address)) == 1:
            return Target(TargetKind.PEER, peer, peer, None)
        return Target(TargetKind.MULTIADDR, str(address), peer, address)
    host, colon, port_text = text.rpartition(":")
    if not colon or text.endswith("]"):
        return _bare_target(text)
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and 0 < int(port_text) <= 0xFFFF):
        raise AddressError(f"{_short(text)}: {_short(port_text)} is no port (1 to 65535)")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _ip(host).version != 6:
            raise AddressError(f"{_short(text)}: brackets are for IPv6 addresses")
    elif ":" in host:
        raise AddressError(f"{_short(text)}: write an IPv6 address with its port as [2001:db8::1]:16111")
    address = _host_address(host, int(port_text))
    shown = f"[{host}]" if ":" in host else host
    return Target(TargetKind.HOST, f"{shown}:{int(port_text)}", None, address)


def _bare_target(text: str) -> Target:
    try:
        peer = parse_peer_id(text)
    except AddressError as error:
        try:
            ip = _ip(text.strip("[]"))
        except AddressError:
            raise AddressError(f"{error}; a target is a multiaddr, a peer id, or host:port") from None
        shown = f"[{ip}]" if ip.version == 6 else str(ip)
        raise AddressError(f"{_short(text)} lacks a port: {shown}:16111 for instance") from None
    return Target(TargetKind.PEER, peer, peer, None)


def _host_address(host: str, port: int) -> Multiaddr:
    try:
        return from_ip_port(host, port)
    except AddressError:
        if host.replace(".", "").isdigit():
            raise  # a mistyped IPv4 address rather than a name
        return parse(f"/dns/{host}/tcp/{port}")


def _short(text: object) -> str:
    shown = repr(text) if not isinstance(text, str) or not text.isprintable() else text
    return shown if len(shown) <= 80 else f"{shown[:60]}… ({len(shown)} characters)"


def _reason(error: BaseException) -> str:
    if isinstance(error, binascii.Error | UnicodeError):
        return "not in its alphabet"
    return _short(str(error).partition("\n")[0])
