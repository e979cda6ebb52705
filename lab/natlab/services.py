"""Port-mapping services of a home router: UPnP IGD, NAT-PMP (RFC 6886) and PCP (RFC 6887).

One small program in the router's namespace answers all three that are switched on, and writes what it grants into the
ruleset's ``map portmap``, whose elements expire by themselves. Where an IPv6 firewall is beside it, PCP opens that,
too: an address that is not translated is "mapped" to itself, and stands in ``set pinholes``. What a client may ask of
a real router it may ask here; what the specifications leave to an operator is decided simply: a port that somebody
else has is refused (UPnP) or replaced by another (NAT-PMP, PCP), and clients map for themselves only.

The messages are read and written by pure functions, `Pmp` and `Upnp` decide, `serve` is the program.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, unescape

PMP_PORT = 5351
SSDP = ("239.255.255.250", 1900)
HTTP_PORT = 5000
MAX_LIFETIME = 86400
"""Seconds of the longest mapping that is granted: a day, as usual. UPnP's 0, "for ever", is this, too."""
MAX_MAPPINGS = 512
"""Mappings of all clients together."""
MAX_REQUEST = 16384
"""Bytes of an HTTP request; a UPnP client's has about 1000."""
HTTP_TIMEOUT = 2.0
"""Seconds that a client may take for its request: the router answers one at a time."""

UDP, TCP = 17, 6
_PROTOCOLS = {UDP: "udp", TCP: "tcp"}


@dataclass(frozen=True, slots=True)
class Mapping:
    """An outside port that leads to an inside endpoint."""

    protocol: str
    outside: int
    host: str
    inside: int
    expires: float
    nonce: bytes = b""
    text: str = ""


@dataclass(slots=True)
class Table:
    """What was granted. ``grant`` and ``revoke`` are told, so that the kernel does it, too.

    Attributes:
        firewall: whether addresses are not translated: then each host has all ports of its own.
        mappings: by protocol and outside port; of a firewall by the inside address and port as well.
    """

    grant: Callable[[Mapping, int], None]
    revoke: Callable[[Mapping], None]
    firewall: bool = False
    mappings: dict[tuple[str, int, str], Mapping] = field(default_factory=dict)

    def key(self, protocol: str, outside: int, host: str = "") -> tuple[str, int, str]:
        return protocol, outside, host if self.firewall else ""

    def expire(self, now: float) -> None:
        for key in [key for key, each in self.mappings.items() if each.expires <= now]:
            del self.mappings[key]

    def find(self, protocol: str, host: str, inside: int) -> Mapping | None:
        wanted = (protocol, host, inside)
        return next(
            (each for each in self.mappings.values() if (each.protocol, each.host, each.inside) == wanted), None
        )

    def add(self, mapping: Mapping, lifetime: int) -> bool:
        """Have this mapping; False: there is no room."""
        key = self.key(mapping.protocol, mapping.outside, mapping.host)
        if old := self.mappings.get(key):
            self.revoke(old)
        elif len(self.mappings) >= MAX_MAPPINGS:
            return False
        self.mappings[key] = mapping
        self.grant(mapping, lifetime)
        return True

    def remove(self, mapping: Mapping) -> None:
        self.revoke(self.mappings.pop(self.key(mapping.protocol, mapping.outside, mapping.host)))

    def free_port(self, protocol: str, wanted: int) -> int:
        """The wanted outside port, or the next that nobody has."""
        port = wanted
        while not self.firewall and self.key(protocol, port) in self.mappings:
            port = port + 1 if port < 65535 else 1024
        return port


@dataclass(slots=True)
class Pmp:
    """NAT-PMP and PCP, which share a port and tell each other apart by the version."""

    table: Table
    outside: Callable[[], str]
    started: float
    natpmp: bool = True
    pcp: bool = True
    seen_outside: str = ""

    def answer(self, data: bytes, client: str, now: float) -> bytes | None:
        """The answer to a datagram; None: it gets none."""
        self.table.expire(now)
        if len(data) < 2 or data[1] & 0x80:
            return None
        outside = self.outside()
        if self.seen_outside not in ("", outside):
            self.started = now  # clients learn of another address by the epoch (RFC 6886 section 3.6, RFC 6887 8.5)
        self.seen_outside = outside
        if data[0] == 0 and self.natpmp:
            return self._natpmp(data, client, now)
        if data[0] == 2 and self.pcp:
            return self._pcp(data, client, now)
        epoch = int(now - self.started)
        if self.pcp:  # unsupported version, and ours
            return struct.pack("!BBBBII12x", 2, data[1] | 0x80, 0, 1, 0, epoch)
        return struct.pack("!BBHI", 0, data[1] | 0x80, 1, epoch)

    def _natpmp(self, data: bytes, client: str, now: float) -> bytes:
        epoch, code = int(now - self.started), data[1]
        if code == 0:
            return struct.pack("!BBHI4s", 0, 128, 0, epoch, socket.inet_aton(self.outside()))
        if code not in (1, 2) or len(data) < 12:
            return struct.pack("!BBHI", 0, code | 0x80, 5, epoch)
        inside, wanted, lifetime = struct.unpack_from("!HHI", data, 4)
        result, outside, granted = self._map("udp" if code == 1 else "tcp", client, inside, wanted, lifetime, now, b"")
        return struct.pack("!BBHIHHI", 0, code | 0x80, result, epoch, inside, outside, granted)

    def _map(
        self, protocol: str, client: str, inside: int, wanted: int, lifetime: int, now: float, nonce: bytes
    ) -> tuple[int, int, int]:
        """Result code (0, or 4: out of resources), outside port and lifetime."""
        old = self.table.find(protocol, client, inside)
        if not lifetime:
            for each in [*self.table.mappings.values()]:
                if each.protocol == protocol and each.host == client and inside in (0, each.inside):
                    self.table.remove(each)
            return 0, 0, 0
        if old or self.table.firewall:
            outside = old.outside if old else inside
        else:
            outside = self.table.free_port(protocol, wanted or inside)
        lifetime = min(lifetime, MAX_LIFETIME)
        made = self.table.add(Mapping(protocol, outside, client, inside, now + lifetime, nonce), lifetime)
        return (0, outside, lifetime) if made else (4, 0, 0)

    def _pcp(self, data: bytes, client: str, now: float) -> bytes:
        epoch, code = int(now - self.started), data[1] & 0x7F

        def reply(result: int, lifetime: int, body: bytes = b"") -> bytes:
            return struct.pack("!BBBBII12x", 2, code | 0x80, 0, result, lifetime, epoch) + (body or data[24:1100])

        if len(data) < 24 or len(data) > 1100 or len(data) % 4:
            return reply(3, 0)  # malformed request
        lifetime, address = struct.unpack_from("!I16s", data, 4)
        claimed = ipaddress.IPv6Address(address)
        if str(claimed.ipv4_mapped or claimed) != client:
            return reply(12, 0)  # the address in the packet is not whence it came: a NAT is between us
        if code == 0:
            return reply(0, lifetime)  # ANNOUNCE
        if code != 1:
            return reply(4, 0)  # unsupported operation: PEER is not for this router
        if len(data) < 60:
            return reply(3, 0)
        nonce, number, inside, wanted = struct.unpack_from("!12sB3xHH", data, 24)
        protocol = _PROTOCOLS.get(number)
        if protocol is None or not inside:
            return reply(9, 0)  # unsupported protocol
        old = self.table.find(protocol, client, inside)
        if old and old.nonce != nonce:
            return reply(2, 0)  # not authorised: somebody else's mapping, as the nonce tells
        if any(option == 2 for option in _options(data[60:])) and self.table.free_port(protocol, wanted) != wanted:
            return reply(11, 0)  # PREFER_FAILURE: this port or none
        result, outside, granted = self._map(protocol, client, inside, wanted, lifetime, now, nonce)
        if result:
            return reply(8, 0)  # no resources
        mapped = claimed.packed if self.table.firewall else ipaddress.IPv6Address(f"::ffff:{self.outside()}").packed
        body = struct.pack("!12sB3xHH16s", nonce, number, inside, outside, mapped)
        return reply(0, granted, body)


def _options(data: bytes) -> Sequence[int]:
    found, at = [], 0
    while at + 4 <= len(data):
        kind, length = struct.unpack_from("!BxH", data, at)
        found.append(kind)
        at += 4 + length + -length % 4
    return found


_TYPES = (
    "upnp:rootdevice",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:WANDevice:1",
    "urn:schemas-upnp-org:device:WANConnectionDevice:1",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
)
_UUID = "uuid:6e61746c-6162-4000-8000-{:012x}"
_SERVICE = _TYPES[-1]
_FAULTS = {
    401: "Invalid Action",
    402: "Invalid Args",
    606: "Action not authorized",
    713: "SpecifiedArrayIndexInvalid",
    714: "NoSuchEntryInArray",
    718: "ConflictInMappingEntry",
    728: "NoPortMapsAvailable",
}


class _Fault(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


def ssdp_answers(data: bytes, location: str) -> list[bytes]:
    """The answers to a search for devices (M-SEARCH): one for each of our types that is meant."""
    text = data.decode(errors="replace")
    if not text.startswith("M-SEARCH * HTTP/1.1"):
        return []
    match = re.search(r"^ST:[ \t]*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    wanted = match[1] if match else ""
    return [
        (
            f"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=1800\r\nEXT:\r\nLOCATION: {location}\r\n"
            f"SERVER: Linux UPnP/1.1 natlab/0.1\r\nST: {each}\r\nUSN: {_uuid(0)}::{each}\r\n\r\n"
        ).encode()
        for each in _TYPES
        if wanted in ("ssdp:all", each)
    ]


def _uuid(number: int) -> str:
    return _UUID.format(number)


def description() -> str:
    """The device description that a search leads to."""

    def device(depth: int, inner: str) -> str:
        name = _TYPES[depth + 1]
        return (
            f"<device><deviceType>{name}</deviceType><friendlyName>natlab router</friendlyName>"
            f"<manufacturer>natlab</manufacturer><modelName>natlab</modelName><UDN>{_uuid(depth)}</UDN>{inner}</device>"
        )

    service = (
        f"<serviceList><service><serviceType>{_SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1"
        "</serviceId><controlURL>/control</controlURL><eventSubURL>/event</eventSubURL><SCPDURL>/scpd.xml</SCPDURL>"
        "</service></serviceList>"
    )
    inner = device(2, service)
    for depth in (1, 0):
        inner = device(depth, f"<deviceList>{inner}</deviceList>")
    return (
        '<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major>'
        f"<minor>0</minor></specVersion>{inner}</root>"
    )


_KEY = ("NewRemoteHost", "NewExternalPort", "NewProtocol")
_VALUE = ("NewInternalPort", "NewInternalClient", "NewEnabled", "NewPortMappingDescription", "NewLeaseDuration")
_ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "GetExternalIPAddress": ((), ("NewExternalIPAddress",)),
    "GetStatusInfo": ((), ("NewConnectionStatus", "NewLastConnectionError", "NewUptime")),
    "AddPortMapping": (_KEY + _VALUE, ()),
    "DeletePortMapping": (_KEY, ()),
    "GetSpecificPortMappingEntry": (_KEY, _VALUE),
    "GetGenericPortMappingEntry": (("NewPortMappingIndex",), _KEY + _VALUE),
}
"""What each action takes and returns."""


def service_description() -> str:
    """What the service can do, which some clients read before they ask."""
    actions = "".join(
        f"<action><name>{action}</name><argumentList>"
        + "".join(
            f"<argument><name>{name}</name><direction>{way}</direction>"
            f"<relatedStateVariable>{name.removeprefix('New')}</relatedStateVariable></argument>"
            for way, names in zip(("in", "out"), arguments, strict=True)
            for name in names
        )
        + "</argumentList></action>"
        for action, arguments in _ACTIONS.items()
    )
    numbers = {"ExternalPort": "ui2", "InternalPort": "ui2", "PortMappingIndex": "ui2", "Enabled": "boolean"}
    numbers |= {"LeaseDuration": "ui4", "Uptime": "ui4"}
    names = dict.fromkeys(name.removeprefix("New") for each in _ACTIONS.values() for names in each for name in names)
    variables = "".join(
        f'<stateVariable sendEvents="no"><name>{name}</name><dataType>{numbers.get(name, "string")}</dataType>'
        "</stateVariable>"
        for name in names
    )
    return (
        '<?xml version="1.0"?><scpd xmlns="urn:schemas-upnp-org:service-1-0"><specVersion><major>1</major>'
        f"<minor>0</minor></specVersion><actionList>{actions}</actionList>"
        f"<serviceStateTable>{variables}</serviceStateTable></scpd>"
    )


@dataclass(slots=True)
class Upnp:
    """WANIPConnection:1, as far as clients use it."""

    table: Table
    outside: Callable[[], str]
    started: float

    def respond(self, request: bytes, client: str, now: float) -> bytes:
        """The answer to a whole HTTP request."""
        head, _, body = request.decode(errors="replace").partition("\r\n\r\n")
        line, *headers = head.split("\r\n")
        if line.startswith("GET /root.xml "):
            return _http("200 OK", description())
        if line.startswith("GET /scpd.xml "):
            return _http("200 OK", service_description())
        if not line.startswith("POST /control "):
            return _http("404 Not Found", "")
        action = next((h.rpartition("#")[2].strip('" ') for h in headers if h.lower().startswith("soapaction:")), "")
        arguments = {name: unescape(value) for name, value in re.findall(r"<(New\w+)[^>]*>([^<]*)</\1>", body)}
        self.table.expire(now)
        try:
            values = self._act(action, arguments, client, now)
        except _Fault as fault:
            return _http("500 Internal Server Error", _soap(
                "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail><UPnPError "
                f'xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>{fault.code}</errorCode><errorDescription>'
                f"{_FAULTS[fault.code]}</errorDescription></UPnPError></detail></s:Fault>"
            ))  # fmt: skip
        inner = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in values.items())
        return _http("200 OK", _soap(f'<u:{action}Response xmlns:u="{_SERVICE}">{inner}</u:{action}Response>'))

    def _act(self, action: str, given: dict[str, str], client: str, now: float) -> dict[str, object]:
        match action:
            case "GetExternalIPAddress":
                return {"NewExternalIPAddress": self.outside()}
            case "GetStatusInfo":
                return {
                    "NewConnectionStatus": "Connected",
                    "NewLastConnectionError": "ERROR_NONE",
                    "NewUptime": int(now - self.started),
                }
            case "AddPortMapping":
                return self._add(given, client, now)
            case "DeletePortMapping":
                mapping = self._entry(given)
                if mapping.host != client:
                    raise _Fault(606)
                self.table.remove(mapping)
                return {}
            case "GetSpecificPortMappingEntry":
                return self._describe(self._entry(given), now)
            case "GetGenericPortMappingEntry":
                number = _number(given, "NewPortMappingIndex", 1 << 16)
                if number >= len(self.table.mappings):
                    raise _Fault(713)
                mapping = list(self.table.mappings.values())[number]
                key = {
                    "NewRemoteHost": "",
                    "NewExternalPort": mapping.outside,
                    "NewProtocol": mapping.protocol.upper(),
                }
                return {**key, **self._describe(mapping, now)}
            case _:
                raise _Fault(401)

    def _add(self, given: dict[str, str], client: str, now: float) -> dict[str, object]:
        protocol, outside = given.get("NewProtocol", "").lower(), _number(given, "NewExternalPort")
        inside, host = _number(given, "NewInternalPort"), given.get("NewInternalClient", "")
        if protocol not in ("tcp", "udp") or not outside or not inside:
            raise _Fault(402)
        if host != client:
            raise _Fault(606)
        old = self.table.mappings.get(self.table.key(protocol, outside))
        if old and old.host != client:
            raise _Fault(718)
        lifetime = min(_number(given, "NewLeaseDuration", 1 << 32) or MAX_LIFETIME, MAX_LIFETIME)
        text = given.get("NewPortMappingDescription", "")[:64]
        if not self.table.add(Mapping(protocol, outside, host, inside, now + lifetime, b"", text), lifetime):
            raise _Fault(728)
        return {}

    def _entry(self, given: dict[str, str]) -> Mapping:
        key = given.get("NewProtocol", "").lower(), _number(given, "NewExternalPort")
        if self.table.key(*key) not in self.table.mappings:
            raise _Fault(714)
        return self.table.mappings[self.table.key(*key)]

    def _describe(self, mapping: Mapping, now: float) -> dict[str, object]:
        return {
            "NewInternalPort": mapping.inside,
            "NewInternalClient": mapping.host,
            "NewEnabled": 1,
            "NewPortMappingDescription": mapping.text,
            "NewLeaseDuration": max(0, int(mapping.expires - now)),
        }


def _number(given: dict[str, str], name: str, below: int = 1 << 16) -> int:
    text = given.get(name, "")
    if not text.isascii() or not text.isdigit() or int(text) >= below:
        raise _Fault(402)
    return int(text)


def _http(status: str, body: str) -> bytes:
    data = body.encode()
    head = f'HTTP/1.1 {status}\r\nContent-Type: text/xml; charset="utf-8"\r\nContent-Length: {len(data)}\r\n'
    return f"{head}Connection: close\r\nServer: Linux UPnP/1.1 natlab/0.1\r\n\r\n".encode() + data


def _soap(inner: str) -> str:
    return (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        f's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>{inner}</s:Body></s:Envelope>'
    )


def serve(lan: str, services: Sequence[str], nft: str, lan6: str = "") -> None:
    """Be a router's services on the LAN of these addresses, for ever; without an IPv6 one there is no firewall."""

    def run(verb: str, where: str, element: str) -> None:
        subprocess.run([nft, verb, "element", *where.split(), f"{{ {element} }}"], check=False)

    def grant(mapping: Mapping, lifetime: int) -> None:
        key = f"{mapping.protocol} . {mapping.outside}"
        run("add", "ip nat portmap", f"{key} timeout {lifetime}s : {mapping.host} . {mapping.inside}")

    def revoke(mapping: Mapping) -> None:
        key = f"{mapping.protocol} . {mapping.outside}"
        run("delete", "ip nat portmap", f"{key} : {mapping.host} . {mapping.inside}")

    def hole(mapping: Mapping) -> str:
        return f"{mapping.protocol} . {mapping.host} . {mapping.inside}"

    def let_in(mapping: Mapping, lifetime: int) -> None:
        run("add", "inet fw pinholes", f"{hole(mapping)} timeout {lifetime}s")

    def shut_out(mapping: Mapping) -> None:
        run("delete", "inet fw pinholes", hole(mapping))

    table, started = Table(grant, revoke), time.monotonic()
    pmp = Pmp(table, _wan_address, started, "natpmp" in services, "pcp" in services)
    pcp6 = Pmp(Table(let_in, shut_out, firewall=True), lambda: lan6, started, natpmp=False)
    upnp = Upnp(table, _wan_address, started)
    poll = select.poll()
    socks: dict[int, socket.socket] = {}

    def listen(kind: int, address: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        poll.register(sock, select.POLLIN)
        socks[sock.fileno()] = sock
        return sock

    pmp_sock = listen(socket.SOCK_DGRAM, lan, PMP_PORT) if pmp.natpmp or pmp.pcp else None
    pcp6_sock = listen(socket.SOCK_DGRAM, lan6, PMP_PORT) if lan6 and pmp.pcp else None
    search = http = None
    if "upnp" in services:
        search = listen(socket.SOCK_DGRAM, "0.0.0.0", SSDP[1])
        membership = socket.inet_aton(SSDP[0]) + socket.inet_aton(lan)
        search.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        http = listen(socket.SOCK_STREAM, lan, HTTP_PORT)
        http.listen()
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    while True:
        for fd, _ in poll.poll():
            sock = socks[fd]
            try:
                if sock is http:
                    _serve_http(sock, upnp)
                    continue
                data, client = sock.recvfrom(MAX_REQUEST)
                if sock in (pmp_sock, pcp6_sock):
                    answer = (pmp if sock is pmp_sock else pcp6).answer(data, client[0], time.monotonic())
                    answers = [answer] if answer else []
                else:
                    answers = ssdp_answers(data, f"http://{lan}:{HTTP_PORT}/root.xml")
                for each in answers:
                    sock.sendto(each, client)
            except OSError as error:  # whoever asked has gone
                sys.stderr.write(f"{error}\n")


def _serve_http(listener: socket.socket, upnp: Upnp) -> None:
    connection, client = listener.accept()
    with connection:
        connection.settimeout(HTTP_TIMEOUT)
        data = b""
        while len(data) < MAX_REQUEST:
            head, end, body = data.partition(b"\r\n\r\n")
            if end:
                match = re.search(rb"^content-length:\s*(\d+)", head, re.MULTILINE | re.IGNORECASE)
                if len(body) >= (int(match[1]) if match else 0):
                    connection.sendall(upnp.respond(data, client[0], time.monotonic()))
                    return
            if not (part := connection.recv(MAX_REQUEST)):
                return
            data += part


def _wan_address() -> str:
    """The router's outside address, which may change at any time."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, 0x8915, struct.pack("40s", b"wan"))  # SIOCGIFADDR
    return socket.inet_ntoa(answer[20:24])


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2].split(","), *sys.argv[3:])
