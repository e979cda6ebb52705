"""The prober, against every type of the lab; and its messages."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from natlab import LabError
from natlab._stun import Message, size_of
from natlab.nat import TYPES, Filtering, Mapping, Port
from natlab.probe import _Look, _mapping, _port, probe
from natlab.reflector import add_reflector, probe_types


@pytest.fixture(scope="module")
def findings():
    return probe_types()


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_what_it_promises(findings, name):
    assert findings[name].differences(name) == []


def test_a_type_is_recognised(findings):
    assert findings["symseq"].types == ("symseq",)
    assert findings["cgn-fc"].types == ("pr",)  # the home router behind the carrier's filters, too
    assert findings["naive"].types == ("pr-rst", "naive")
    assert findings["pr"].differences("sym")[0] == "UDP mapping: EIM, not APDM"
    assert not findings["pr"].udp.hairpin
    assert not findings["pr"].tcp.hairpin


def _looks(*ports, address="11.1.0.2"):
    """As one local port 4000 is seen, and then another."""
    return [_Look(None, ("192.168.1.10", 4000), [(address, port) for port in each]) for each in ports]


@pytest.mark.parametrize(
    ("ports", "mapping", "port"),
    [
        (([4000, 4000, 4000], [4000, 4000, 4000]), Mapping.EIM, Port.KEEP),
        (([5000, 5000, 5000], [4000, 4000, 4000]), Mapping.EIM, Port.CHANGE),
        (([5000, 5001, 5001], [5002, 5003, 5003]), Mapping.ADM, Port.CHANGE),
        (([5000, 5001, 5002], [5005, 5006, 5009]), Mapping.APDM, Port.PLUS_ONE),
        (([5000, 5001, 5002], [5200, 5100, 5002]), Mapping.APDM, Port.BLOCK),
        (([5000, 5300, 5300], [5200, 5100, 5002]), Mapping.APDM, Port.BLOCK),
        (([5000, 5300, 5400], [9000, 5100, 5002]), Mapping.APDM, Port.RANDOM),
    ],
)
def test_what_looks_say(ports, mapping, port):
    looks = _looks(*ports)
    assert _mapping(looks) is mapping
    assert _port(looks, mapping) is port
    assert _mapping(_looks([4000] * 3, address="192.168.1.10")) is Mapping.NONE


@pytest.mark.natlab("a=pr,hairpin", "b=fcx,hairpin", "c=cgn-ar,hairpin", "d=eimx,hairpin")
def test_hairpin_leaves_all_else_as_it_was(lab):
    server = add_reflector(lab)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: probe(server, lab[name].socket), "abcd"))
    # Behind the carrier's router, the one at home takes what was sent back for unsolicited.
    assert [(each.udp.hairpin, each.tcp.hairpin) for each in found] == [
        (True,) * 2,
        (True,) * 2,
        (False,) * 2,
        (True,) * 2,
    ]
    for each, name in zip(found, ("pr", "fcx", "cgn-ar", "eimx"), strict=True):
        assert each.differences(name) == []


@pytest.mark.natlab("a=pr,udp_lifetime=2s,tcp_lifetime=3s", "b=fc,udp_lifetime=3s,tcp_lifetime=2s")
def test_lifetimes_are_measured(lab):
    server = add_reflector(lab)
    with ThreadPoolExecutor(2) as pool:
        pr, fc = pool.map(lambda name: probe(server, lab[name].socket, lifetime=6), "ab")
    # The kernel forgets up to a second late, more on a busy machine.
    assert 1 <= pr.udp.lifetime <= 4
    assert 2 <= pr.tcp.lifetime <= 5
    assert 2 <= fc.udp.lifetime <= 5


@pytest.mark.natlab("a=pr,ipv6=fw", "b=pr,ipv6=open")
def test_the_ipv6_firewall_filters_and_maps_nothing(lab):
    add_reflector(lab)
    server = (lab["reflector"].address6, 3478)
    reflector = lab["reflector"]
    reflector.kill()
    other = server[0][:-1] + "3"
    reflector.spawn_python(_serve, [server[0], other]).expect("serving")
    fw, opened = (probe(server, lab[name].socket) for name in "ab")
    for found in (fw.udp, fw.tcp):
        assert (found.mapping, found.filtering, found.unsolicited) == (Mapping.NONE, Filtering.APDF, "dropped")
    for found in (opened.udp, opened.tcp):
        assert (found.mapping, found.filtering) == (Mapping.NONE, Filtering.NONE)


def _serve(addresses):
    from natlab.probe import serve

    serve(addresses, ready=lambda: print("serving"))


@pytest.mark.natlab("a=pr", "silent=public")
def test_no_answer_is_one_sentence(lab):
    with pytest.raises(LabError, match=r"server 11\.2\.0\.2 port 3478 does not answer"):
        probe((lab["silent"].address, 3478), lab["a"].socket)


def test_messages_come_back_as_they_were():
    for message in (
        Message.request(change_address=True, response_port=99, udp=True, poke=True),
        Message.request(change_port=True),
        Message(bytes(12), False, ("11.1.0.2", 4242), ("2d00::1", 3479), outcome="dropped"),
        Message(bytes(12), False, ("2d00::7", 1)),
    ):
        data = message.pack()
        assert Message.unpack(data) == message
        assert size_of(data[:20]) == len(data)


def test_the_example_of_the_rfc_is_read():
    """RFC 5769, section 2.2: a response that maps 192.0.2.1 port 32853; its integrity attributes are skipped."""
    data = bytes.fromhex(
        "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
        "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
    )
    assert Message.unpack(data).mapped == ("192.0.2.1", 32853)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        Message(bytes(12)).pack()[:-1],
        Message(bytes(12)).pack() + b"x",
        Message(bytes(12)).pack()[:2] + b"\0\x04" + Message(bytes(12), response_port=1).pack()[4:-4],
    ],
    ids=["nothing", "HTTP", "short", "long", "an attribute that is cut off"],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ValueError, match=r"\w"):
        Message.unpack(data)
