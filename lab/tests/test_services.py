"""Port-mapping services: as messages, without a kernel; and as a client meets them."""

import re
import socket
import struct
from xml.etree import ElementTree

import pytest

from natlab.running import find_nft
from natlab.services import MAX_LIFETIME, MAX_MAPPINGS, Pmp, Table, Upnp, description, service_description, ssdp_answers

ALICE, EVE = "192.168.1.10", "192.168.1.11"


class Kernel:
    """Remembers what would be in the ruleset."""

    def __init__(self):
        self.map = {}

    def grant(self, mapping, lifetime):
        self.map[mapping.protocol, mapping.outside] = (mapping.host, mapping.inside, lifetime)

    def revoke(self, mapping):
        del self.map[mapping.protocol, mapping.outside]


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def table(kernel):
    return Table(kernel.grant, kernel.revoke)


@pytest.fixture
def pmp(table):
    return Pmp(table, lambda: "11.1.0.2", started=100.0)


def _natpmp(inside, outside, lifetime, code=1):
    return struct.pack("!BBHHHI", 0, code, 0, inside, outside, lifetime)


def test_natpmp_tells_the_outside_address(pmp):
    assert pmp.answer(b"\0\0", ALICE, 142.0) == b"\0\x80\0\0" + struct.pack("!I", 42) + bytes([11, 1, 0, 2])


def test_natpmp_maps_renews_and_unmaps(pmp, kernel):
    def ask(*request, host=ALICE, now=100.0):
        return struct.unpack("!BBHIHHI", pmp.answer(_natpmp(*request), host, now))

    assert ask(4000, 4000, 3600) == (0, 129, 0, 0, 4000, 4000, 3600)
    assert kernel.map == {("udp", 4000): (ALICE, 4000, 3600)}
    assert ask(4000, 9999, 10**6)[5:] == (4000, MAX_LIFETIME)  # it has a mapping, and keeps it
    assert ask(4000, 4000, 60, host=EVE)[5] == 4001  # taken: another one
    assert ask(4000, 4000, 60, 2)[5] == 4000  # TCP is another matter
    assert ask(4000, 0, 0, host=EVE)[4:] == (4000, 0, 0)
    assert set(kernel.map) == {("udp", 4000), ("tcp", 4000)}
    assert ask(4000, 4000, 60, host=EVE, now=100.0 + MAX_LIFETIME)[5] == 4000  # expired by then


def test_natpmp_refuses_when_full(pmp):
    for port in range(MAX_MAPPINGS):
        pmp.answer(_natpmp(1000 + port, 0, 60), ALICE, 100.0)
    assert struct.unpack("!BBHIHHI", pmp.answer(_natpmp(9, 0, 60), EVE, 100.0))[2] == 4


def _pcp(inside, outside, lifetime, host=ALICE, nonce=b"n" * 12, code=1, protocol=17, options=b""):
    client = b"\0" * 10 + b"\xff\xff" + socket.inet_aton(host)
    body = struct.pack("!12sB3xHH", nonce, protocol, inside, outside) + bytes(10) + b"\xff\xff" + bytes(4)
    return struct.pack("!BBHI16s", 2, code, 0, lifetime, client) + body + options


def test_pcp_maps_and_says_where(pmp, kernel):
    answer = pmp.answer(_pcp(4000, 5000, 120), ALICE, 107.0)
    assert struct.unpack_from("!BBBBII", answer) == (2, 129, 0, 0, 120, 7)
    assert struct.unpack_from("!12sB3xHH", answer, 24) == (b"n" * 12, 17, 4000, 5000)
    assert answer[44:] == bytes(10) + b"\xff\xff" + bytes([11, 1, 0, 2])
    assert kernel.map == {("udp", 5000): (ALICE, 4000, 120)}


@pytest.mark.parametrize(
    ("request_", "host", "result"),
    [
        (_pcp(4000, 5000, 120, nonce=b"x" * 12), ALICE, 2),  # not authorised
        (_pcp(4000, 5000, 120)[:22], ALICE, 3),  # malformed
        (_pcp(4000, 5000, 120)[:40], ALICE, 3),
        (_pcp(4000, 5000, 120, code=2), ALICE, 4),  # PEER
        (_pcp(0, 5000, 120), ALICE, 9),
        (_pcp(4000, 5000, 120, protocol=1), ALICE, 9),
        (_pcp(4001, 5000, 120, options=b"\2\0\0\0"), ALICE, 11),  # this port or none
        (_pcp(4000, 5000, 120, host=EVE), ALICE, 12),
        (b"\3\1\0\0", ALICE, 1),
    ],
)
def test_pcp_refuses(pmp, request_, host, result):
    pmp.answer(_pcp(4000, 5000, 120), ALICE, 100.0)
    answer = pmp.answer(request_, host, 100.0)
    assert (answer[0], answer[1] & 0x80, answer[3]) == (2, 0x80, result)


def test_pcp_opens_a_firewall_for_each_host_by_itself():
    holes = set()
    table = Table(
        lambda mapping, lifetime: holes.add((mapping.host, mapping.inside)),
        lambda mapping: holes.remove((mapping.host, mapping.inside)),
        firewall=True,
    )
    router = Pmp(table, str, 100.0, natpmp=False)

    def ask(host, lifetime):
        address = socket.inet_pton(socket.AF_INET6, host)
        body = struct.pack("!12sB3xHH16x", b"n" * 12, 6, 4000, 5000)
        answer = router.answer(struct.pack("!BBHI16s", 2, 1, 0, lifetime, address) + body, host, 100.0)
        assert struct.unpack_from("!BBBBI", answer) == (2, 129, 0, 0, lifetime)
        assert answer[44:] == address or not lifetime
        return struct.unpack_from("!HH", answer, 40)

    assert ask("2d00::10", 120) == ask("2d00::11", 120) == (4000, 4000)
    assert holes == {("2d00::10", 4000), ("2d00::11", 4000)}
    ask("2d00::10", 60)
    ask("2d00::11", 0)
    assert holes == {("2d00::10", 4000)}
    assert router.answer(_pcp(4000, 4000, 60), "2d00::10", 100.0)[3] == 12


def test_only_requests_to_a_service_that_is_on_are_answered(table):
    pcp_only = Pmp(table, lambda: "11.1.0.2", 0.0, natpmp=False)
    assert pcp_only.answer(b"\0\0", ALICE, 0.0)[:4] == b"\2\x80\0\1"
    natpmp_only = Pmp(table, lambda: "11.1.0.2", 0.0, pcp=False)
    assert natpmp_only.answer(_pcp(1, 1, 1), ALICE, 0.0)[:4] == b"\0\x81\0\1"
    assert pcp_only.answer(b"\2\x81\0\0", ALICE, 0.0) is None
    assert pcp_only.answer(b"", ALICE, 0.0) is None


def _soap(upnp, action, host=ALICE, **arguments):
    inner = "".join(f"<New{name}>{value}</New{name}>" for name, value in arguments.items())
    body = f"<s:Envelope><s:Body><u:{action}>{inner}</u:{action}></s:Body></s:Envelope>"
    head = f'POST /control HTTP/1.1\r\nSOAPAction: "urn:schemas-upnp-org:service:WANIPConnection:1#{action}"'
    return upnp.respond(f"{head}\r\n\r\n{body}".encode(), host, 100.0).decode()


def test_upnp_maps_lists_and_unmaps(table, kernel):
    upnp = Upnp(table, lambda: "11.1.0.2", 0.0)
    assert "<NewExternalIPAddress>11.1.0.2<" in _soap(upnp, "GetExternalIPAddress")
    wanted = {
        "ExternalPort": 4000,
        "Protocol": "TCP",
        "InternalPort": 4001,
        "InternalClient": ALICE,
        "LeaseDuration": 0,
    }
    assert "200 OK" in _soap(upnp, "AddPortMapping", **wanted, PortMappingDescription="a &amp; b")
    assert kernel.map == {("tcp", 4000): (ALICE, 4001, MAX_LIFETIME)}
    listed = _soap(upnp, "GetGenericPortMappingEntry", PortMappingIndex=0)
    assert "<NewInternalPort>4001<" in listed
    assert "a &amp; b" in listed
    assert "<errorCode>713<" in _soap(upnp, "GetGenericPortMappingEntry", PortMappingIndex=1)
    assert "<errorCode>718<" in _soap(upnp, "AddPortMapping", EVE, **{**wanted, "InternalClient": EVE})
    assert "<errorCode>606<" in _soap(upnp, "AddPortMapping", EVE, **wanted)
    assert "<errorCode>402<" in _soap(upnp, "AddPortMapping", **{**wanted, "ExternalPort": 70000})
    assert "<errorCode>402<" in _soap(upnp, "AddPortMapping", **{**wanted, "Protocol": "SCTP"})
    assert "<errorCode>401<" in _soap(upnp, "Reboot")
    key = {"ExternalPort": 4000, "Protocol": "TCP"}
    assert "<errorCode>606<" in _soap(upnp, "DeletePortMapping", EVE, **key)
    assert "200 OK" in _soap(upnp, "DeletePortMapping", **key)
    assert "<errorCode>714<" in _soap(upnp, "GetSpecificPortMappingEntry", **key)
    assert kernel.map == {}


def test_a_search_leads_to_the_description():
    target = b"urn:schemas-upnp-org:device:InternetGatewayDevice:1"
    search = b'M-SEARCH * HTTP/1.1\r\nMAN: "ssdp:discover"\r\nST: ' + target + b"\r\n\r\n"
    (answer,) = ssdp_answers(search, "http://192.168.1.1:5000/root.xml")
    assert b"LOCATION: http://192.168.1.1:5000/root.xml\r\n" in answer
    assert len(ssdp_answers(search.replace(target, b"ssdp:all"), "")) == 5
    assert ssdp_answers(b"NOTIFY * HTTP/1.1\r\n\r\n", "") == []
    assert description().count("<device>") == 3


def test_the_service_describes_exactly_what_it_does(table):
    upnp = Upnp(table, lambda: "11.1.0.2", 0.0)
    names = {"s": "urn:schemas-upnp-org:service-1-0"}
    described = ElementTree.fromstring(service_description())
    variables = {each.text for each in described.findall(".//s:stateVariable/s:name", names)}
    assert variables == {each.text for each in described.findall(".//s:relatedStateVariable", names)}
    values = {"ExternalPort": 4000, "Protocol": "UDP", "InternalPort": 4000, "InternalClient": ALICE}
    values |= {"RemoteHost": "", "Enabled": 1, "PortMappingDescription": "", "LeaseDuration": 60}
    actions = {each.findtext("s:name", "", names): each for each in described.findall(".//s:action", names)}
    for name in sorted(actions, key="DeletePortMapping".__eq__):  # last
        arguments = {"in": [], "out": []}
        for each in actions[name].findall(".//s:argument", names):
            arguments[each.findtext("s:direction", "", names)].append(each.findtext("s:name", "", names))
        given = {each.removeprefix("New"): {**values, "PortMappingIndex": 0}[each[3:]] for each in arguments["in"]}
        said = _soap(upnp, name, **given)
        assert re.findall(r"<(New\w+)>", said) == arguments["out"], name


def _knock(lab, port):
    """Whether a stranger's packet to an outside port gets to alice's port 4000."""
    with (
        lab["alice"].socket(socket.AF_INET, socket.SOCK_DGRAM) as inside,
        lab["relay"].socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        inside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        inside.bind(("0.0.0.0", 4000))
        inside.settimeout(0.3)
        stranger.sendto(b"knock", (lab["alice"].public_address, port))
        try:
            return inside.recv(10) == b"knock"
        except TimeoutError:
            return False


def _ask(lab, request):
    with lab["alice"].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(request, ("192.168.1.1", 5351))
        return sock.recv(1100)


@pytest.mark.natlab("alice=sym,services=natpmp+pcp", "relay=public")
def test_a_granted_port_lets_strangers_in(lab):
    assert not _knock(lab, 4000)
    assert struct.unpack("!BBHIHHI", _ask(lab, _natpmp(4000, 4000, 60)))[5] == 4000
    assert _knock(lab, 4000)
    _ask(lab, _natpmp(4000, 0, 0))
    lab.router("alice").reboot()  # also forgets the connection of the last knock
    assert not _knock(lab, 4000)
    assert _ask(lab, _pcp(4000, 5000, 60))[3] == 0
    assert _knock(lab, 5000)
    lab.router("alice").change_address()
    assert not _knock(lab, 5000)
    assert _ask(lab, b"\0\0")[-4:] == socket.inet_aton("11.1.0.3")


@pytest.mark.natlab("alice=pr,services=natpmp", "relay=public")
def test_a_grant_expires(lab):
    _ask(lab, _natpmp(4000, 4000, 1))
    while "4000" in lab.router("alice").run([find_nft(), "list", "map", "ip", "nat", "portmap"]).stdout:
        pass
    assert not _knock(lab, 4000)


@pytest.mark.natlab(
    "a=pr,hosts=alice+eve,services=natpmp,hairpin", "b=pr,hosts=bob+ann,services=natpmp", "relay=public"
)
@pytest.mark.parametrize(("owner", "neighbour"), [("alice", "eve"), ("bob", "ann")])
def test_a_granted_port_is_open_to_neighbours_where_there_is_hairpin(lab, owner, neighbour):
    kind = (socket.AF_INET, socket.SOCK_DGRAM)
    with lab[owner].socket(*kind) as inside, lab[neighbour].socket(*kind) as other, lab["relay"].socket(*kind) as far:
        inside.bind(("0.0.0.0", 4000))
        inside.settimeout(5)
        inside.sendto(_natpmp(4000, 5000, 60), ("192.168.1.1", 5351))
        inside.recv(100)
        other.sendto(b"neighbour", (lab[owner].public_address, 5000))
        other.sendto(b"neighbour", (lab[owner].public_address, 5000))
        far.sendto(b"stranger", (lab[owner].public_address, 5000))
        heard = {}
        while b"stranger" not in heard:
            text, origin = inside.recvfrom(100)
            heard[text] = origin[0]
        through = {b"neighbour": lab[owner].public_address} if owner == "alice" else {}
        assert heard == {b"stranger": lab["relay"].address, **through}


@pytest.mark.natlab("alice=pr,services=upnp", "relay=public")
def test_a_client_of_upnp_finds_the_router_and_maps(lab):
    pytest.importorskip("miniupnpc")

    def client():
        import miniupnpc

        upnp = miniupnpc.UPnP()
        upnp.discoverdelay = 500
        assert upnp.discover() >= 1
        upnp.selectigd()
        assert upnp.addportmapping(6000, "UDP", upnp.lanaddr, 4000, "test", "")
        return upnp.externalipaddress(), upnp.getspecificportmapping(6000, "UDP")[:2], upnp.lanaddr

    assert lab["alice"].python(client) == ("11.1.0.2", ("192.168.1.10", 4000), "192.168.1.10")
    assert _knock(lab, 6000)
