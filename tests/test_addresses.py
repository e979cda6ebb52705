from __future__ import annotations

import ipaddress

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.addresses import TargetKind
from kas_libp2p.errors import AddressError

ALICE = "12D3KooWHHzSeKaY8xuZVzkLbKFfvNgPPeKhFBGrMbNzbm5akpqu"
BOB = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
CIRCUIT = f"/ip4/11.0.0.1/tcp/4001/p2p/{ALICE}/p2p-circuit/p2p/{BOB}"

ips = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
ports = st.integers(0, 65535)
peers = st.one_of(
    st.binary(min_size=32, max_size=32).map(lambda data: b"\x12\x20" + data),
    st.binary(min_size=1, max_size=42).map(lambda data: bytes((0, len(data))) + data),
).map(addresses.peer_id_from_bytes)


def ip_equal(a: str, b: str) -> bool:
    one, other = (ipaddress.ip_address(text) for text in (a, b))
    mapped = getattr(other, "ipv4_mapped", None)
    return one in (other, mapped)


class TestPeerIds:
    # Published vectors: libp2p/specs peer-ids.
    def test_the_forms_of_one_id_are_equal(self) -> None:
        base58 = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
        cid = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe"
        assert addresses.parse_peer_id(base58) == addresses.parse_peer_id(cid) == base58
        assert addresses.peer_id_to_cid(base58) == cid

    def test_an_ed25519_id_in_cid_form(self) -> None:
        cid = "bafzaajaiaejca6xlzvqhpqrxf5r5gyb5jfpqjmrd6jx3qwllqz3xnmx2yxhd2mqu"
        assert addresses.parse_peer_id(cid) == "12D3KooWJ6CTCxCNcQdLyAnp9wNaxtj7VbGEZkkgZHAZufcUVk83"

    @given(peers)
    def test_every_id_survives_both_forms(self, peer: str) -> None:
        assert addresses.parse_peer_id(peer) == peer
        assert addresses.parse_peer_id(addresses.peer_id_to_cid(peer)) == peer
        assert addresses.peer_id_from_bytes(addresses.peer_id_to_bytes(peer)) == peer

    def test_base36_and_base58_cids(self) -> None:
        data = b"\x01\x72" + addresses.peer_id_to_bytes(ALICE)
        number, digits = int.from_bytes(data, "big"), ""
        while number:
            number, digit = divmod(number, 36)
            digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
        assert addresses.parse_peer_id("k" + digits) == ALICE
        assert addresses.parse_peer_id("z" + base58.b58encode(data).decode()) == ALICE

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "1",
            "Qm",
            "12D3KooW",
            ALICE + "1",
            ALICE[:-1] + "0",
            "ä" * 10,
            "b",
            "bafz",
            "b!!!",
            "k!",
            "zz",
            "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi",  # a file, not a key
            "1" * 128,
            "1" * 100_000,
            "Qm" + "z" * 44,
        ],
    )
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(AddressError):
            addresses.parse_peer_id(text)

    @given(st.text(max_size=200))
    def test_any_text_is_an_id_or_an_address_error(self, text: str) -> None:
        try:
            peer = addresses.parse_peer_id(text)
        except AddressError:
            return
        assert addresses.parse_peer_id(peer) == peer

    @pytest.mark.parametrize(
        "data", [b"", b"\x00", b"\x00\x00", b"\x00\x2b" + bytes(43), b"\x12\x1f" + bytes(31), b"\x13\x01a"]
    )
    def test_bytes_that_are_none(self, data: bytes) -> None:
        with pytest.raises(AddressError):
            addresses.peer_id_from_bytes(data)


class TestParse:
    @pytest.mark.parametrize(
        "text",
        [
            "/ip4/192.0.2.1/tcp/16111",
            "/ip6/2d00::1/tcp/1",
            "/ip6zone/eth0/ip6/fe80::1/tcp/1",
            "/dns/example.org/tcp/1",
            "/dns4/example.org/tcp/1",
            "/dns6/example.org/tcp/1",
            "/dnsaddr/bootstrap.libp2p.io",
            f"/dnsaddr/bootstrap.libp2p.io/p2p/{BOB}",
            "/ip4/192.0.2.1/udp/1/quic-v1",
            "/ip4/192.0.2.1/tcp/1/ws",
            f"/p2p/{ALICE}",
            "/p2p-circuit",
            CIRCUIT,
        ],
    )
    def test_text_and_bytes_round_trip(self, text: str) -> None:
        address = addresses.parse(text)
        assert str(address) == text
        assert addresses.parse(address.to_bytes()) == addresses.parse(address) == address
        joined = "".join(
            f"/{name}" if value is None else f"/{name}/{value}" for name, value in addresses.components(text)
        )
        assert joined == text

    def test_one_form(self) -> None:
        cid = addresses.peer_id_to_cid(ALICE)
        assert str(addresses.parse(f"/ip4/192.0.2.1/tcp/1/ipfs/{cid}/")) == f"/ip4/192.0.2.1/tcp/1/p2p/{ALICE}"
        in_bytes = b"\xa5\x03\x28\x01\x72" + addresses.peer_id_to_bytes(ALICE)
        assert addresses.parse(in_bytes) == addresses.parse(f"/p2p/{ALICE}")

    def test_a_zone_is_read_back(self) -> None:
        # multiaddr 0.2 itself iterates over this one as ("ip6zone", None), ("ip4", "101.116.104.48"), …
        expected = (("ip6zone", "eth0"), ("ip6", "fe80::1"), ("tcp", "1"))
        assert addresses.components("/ip6zone/eth0/ip6/fe80::1/tcp/1") == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "/",
            "//",
            "ip4/192.0.2.1/tcp/1",
            "/ip4//tcp/1",
            "//ip4/192.0.2.1/tcp/1",
            "/ip4/192.0.2.1/tcp",
            "/ip4/192.0.2.1/tcp/65536",
            "/ip4/192.0.2.1/tcp/-1",
            "/ip4/192.0.2.1/tcp/ 1",
            "/ip4/192.0.2.1/tcp/1_0",
            "/ip4/192.0.2.1/tcp/٨",
            "/ip4/192.0.2.01/tcp/1",
            "/ip4/192.0.2/tcp/1",
            "/ip6/fe80::1%eth0/tcp/1",
            "/ip4=192.0.2.1/tcp/1",
            "/nonsense/1",
            "/dns/a..b/tcp/1",
            "/dns/a b/tcp/1",
            "/p2p/abc",
            "/p2p-circuit/foo",
            "/dns/" + "a" * 2000 + "/tcp/1",
        ],
    )
    def test_text_that_is_none(self, text: str) -> None:
        with pytest.raises(AddressError):
            addresses.parse(text)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x04\x01\x02",  # cut short; multiaddr itself reads 0.0.1.2
            b"\xff" * 20,
            b"\xa5\x03\xff\xff\xff\xff\xff\x01",
            b"\xa5\x03\x00",
            b"\x35\x02\xff\xfe",
            b"\x04\x01\x02\x03\x04" * 300,
        ],
    )
    def test_bytes_that_are_none(self, data: bytes) -> None:
        with pytest.raises(AddressError):
            addresses.parse(data)
        if data:
            with pytest.raises(AddressError):
                addresses.ip_port(Multiaddr(data))

    @given(st.binary(max_size=80))
    def test_any_bytes_parse_or_raise_an_address_error(self, data: bytes) -> None:
        try:
            address = addresses.parse(data)
        except AddressError:
            return
        assert addresses.parse(str(address)) == address

    @given(
        st.lists(
            st.sampled_from(
                ["ip4", "ip6", "ip6zone", "tcp", "p2p", "p2p-circuit", "dns", "unix", "onion3", "certhash", "memory"]
            )
            | st.sampled_from(
                ["ipcidr", "garlic64", "http-path", "1.2.3.4", "::1", "80", "x", "a.b", "%2f", "ü", "", "\0", ALICE]
            )
            | st.text(max_size=8),
            max_size=8,
        )
    )
    def test_any_text_parses_or_raises_an_address_error(self, parts: list[str]) -> None:
        text = "/" + "/".join(parts)
        try:
            address = addresses.parse(text)
        except AddressError:
            return
        assert addresses.parse(address.to_bytes()) == address
        for fact in (addresses.family, addresses.ip_port, addresses.is_public, addresses.relay_of, addresses.peer_of):
            fact(address)


class TestWhose:
    def test_the_peer_is_the_last_component(self) -> None:
        assert addresses.peer_of(CIRCUIT) == BOB
        assert addresses.peer_of(f"/ip4/11.0.0.1/tcp/1/p2p/{ALICE}") == ALICE
        assert addresses.peer_of("/ip4/11.0.0.1/tcp/1") is None

    def test_the_relay_is_not_the_peer(self) -> None:
        without_target = CIRCUIT.removesuffix(f"/p2p/{BOB}")
        assert addresses.peer_of(without_target) is None
        assert addresses.relay_of(without_target) == ALICE

    def test_relay(self) -> None:
        assert addresses.is_relayed(CIRCUIT)
        assert addresses.relay_of(CIRCUIT) == ALICE
        assert str(addresses.relay_address(CIRCUIT)) == f"/ip4/11.0.0.1/tcp/4001/p2p/{ALICE}"
        direct = "/ip4/11.0.0.1/tcp/4001"
        assert not addresses.is_relayed(direct)
        assert addresses.relay_of(direct) is None
        assert addresses.relay_of("/p2p-circuit") is None
        assert addresses.relay_of(f"/ip4/11.0.0.1/tcp/4001/p2p-circuit/p2p/{BOB}") is None

    @given(ips, ports, peers)
    def test_with_and_without_peer(self, ip: str, port: int, peer: str) -> None:
        bare = addresses.from_ip_port(ip, port)
        full = addresses.with_peer(bare, peer)
        assert addresses.peer_of(full) == peer
        assert addresses.without_peer(full) == addresses.without_peer(bare) == bare
        assert addresses.with_peer(full, peer) == full

    def test_another_peers_address(self) -> None:
        with pytest.raises(AddressError, match="another peer"):
            addresses.with_peer(CIRCUIT, ALICE)

    def test_a_peer_alone_has_no_address(self) -> None:
        with pytest.raises(AddressError, match="alone"):
            addresses.without_peer(f"/p2p/{ALICE}")

    def test_names(self) -> None:
        assert addresses.name_of("/dnsaddr/example.org") == ("dnsaddr", "example.org")
        assert addresses.name_of("/ip4/11.0.0.1/tcp/1") is None


class TestWhere:
    @given(ips, ports)
    def test_ip_and_port_round_trip(self, ip: str, port: int) -> None:
        address = addresses.from_ip_port(ip, port)
        found = addresses.ip_port(address)
        assert found is not None
        assert found[1] == port
        assert ip_equal(found[0], ip)
        assert addresses.ip_port(addresses.with_peer(address, ALICE)) == found
        assert addresses.parse(addresses.ip_port_text(*found)) == address

    def test_a_zone_stays(self) -> None:
        address = addresses.from_ip_port("fe80::1%eth0", 5)
        assert str(address) == "/ip6zone/eth0/ip6/fe80::1/tcp/5" == addresses.ip_port_text("fe80::1%eth0", 5)
        assert addresses.ip_port(address) == ("fe80::1%eth0", 5)
        assert addresses.family(address) == 6
        assert addresses.is_private(address)

    @pytest.mark.parametrize(
        "text",
        [CIRCUIT, "/ip4/11.0.0.1/tcp/1/ws", "/ip4/11.0.0.1/udp/1/quic-v1", "/dns4/example.org/tcp/1", "/ip4/11.0.0.1"],
    )
    def test_what_plain_tcp_does_not_reach(self, text: str) -> None:
        assert addresses.ip_port(text) is None

    @pytest.mark.parametrize(("ip", "port"), [("x", 1), ("1.2.3.4", -1), ("1.2.3.4", 65536), ("", 1), ("fe80::1%", 1)])
    def test_no_ip_or_port(self, ip: str, port: int) -> None:
        with pytest.raises(AddressError):
            addresses.from_ip_port(ip, port)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("/ip4/11.0.0.1/tcp/1", 4),
            ("/ip6/::1/tcp/1", 6),
            ("/dns4/example.org/tcp/1", 4),
            ("/dns6/example.org/tcp/1", 6),
            ("/dns/example.org/tcp/1", None),
            (f"/p2p/{ALICE}", None),
        ],
    )
    def test_family(self, text: str, expected: int | None) -> None:
        assert addresses.family(text) == expected

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("11.0.0.1", "public"),
            ("8.8.8.8", "public"),
            ("2d00::1", "public"),
            ("2600::1", "public"),
            ("/ip4/11.0.0.1/tcp/1", "public"),
            ("/dns4/example.com.au/tcp/1", "public"),
            ("/dnsaddr/bootstrap.libp2p.io", "public"),
            ("10.1.2.3", "private"),
            ("172.31.0.1", "private"),
            ("192.168.1.1", "private"),
            ("100.64.0.1", "private"),
            ("100.127.255.255", "private"),
            ("169.254.1.1", "private"),
            ("fd12::1", "private"),
            ("fc00::1", "private"),
            ("fe80::1", "private"),
            ("::ffff:10.0.0.1", "private"),
            ("127.0.0.1", "loopback"),
            ("127.255.0.9", "loopback"),
            ("::1", "loopback"),
            ("::ffff:127.0.0.1", "loopback"),
            ("/dns4/localhost/tcp/1", "loopback"),
            ("/dns4/a.LOCALHOST/tcp/1", "loopback"),
            ("0.0.0.0", "wildcard"),
            ("::", "wildcard"),
            ("192.0.2.1", "nothing"),
            ("198.51.100.1", "nothing"),
            ("203.0.113.1", "nothing"),
            ("198.18.0.1", "nothing"),
            ("192.0.0.9", "nothing"),
            ("192.88.99.1", "nothing"),
            ("224.0.0.1", "nothing"),
            ("239.1.1.1", "nothing"),
            ("240.0.0.1", "nothing"),
            ("255.255.255.255", "nothing"),
            ("ff02::1", "nothing"),
            ("ff0e::1", "nothing"),
            ("2001:db8::1", "nothing"),
            ("3fff::1", "nothing"),
            ("2002:808:808::1", "nothing"),
            ("2001::1", "nothing"),
            ("64:ff9b::808:808", "nothing"),
            ("4000::1", "nothing"),
            ("::8.8.8.8", "nothing"),
            ("::ffff:8.8.8.8", "nothing"),
            ("/dns4/router.lan/tcp/1", "nothing"),
            ("/dns4/kaspad/tcp/1", "nothing"),
            ("/dns4/node.home.arpa./tcp/1", "nothing"),
            (f"/p2p/{ALICE}", "nothing"),
        ],
    )
    def test_how_far_it_reaches(self, text: str, kind: str) -> None:
        seen = {
            "public": addresses.is_public(text),
            "private": addresses.is_private(text),
            "loopback": addresses.is_loopback(text),
            "wildcard": addresses.is_wildcard(text),
        }
        assert [name for name, yes in seen.items() if yes] == ([] if kind == "nothing" else [kind])

    @given(st.ip_addresses(v=4))
    def test_of_ipv4_nothing_is_public_that_python_does_not_call_global(self, ip: ipaddress.IPv4Address) -> None:
        if addresses.is_public(str(ip)):
            assert ip.is_global
            assert not ip.is_multicast

    def test_subnets(self) -> None:
        assert addresses.subnet_key("11.1.2.3") == "11.1.2.3"
        assert addresses.subnet_key("/ip4/11.1.2.3/tcp/1") == "11.1.2.3"
        assert addresses.subnet_key("::ffff:11.1.2.3") == "11.1.2.3"
        assert addresses.subnet_key("2d00:1:2:3:4::5") == "2d00:1:2:3::/64" == addresses.subnet_key("2d00:1:2:3::")
        assert addresses.subnet_key("fe80::1%eth0") == "fe80::/64"
        assert addresses.network_key("11.1.2.3") == addresses.network_key("/ip4/11.1.9.9/tcp/1") == "11.1.0.0/16"
        assert addresses.network_key("::ffff:11.1.2.3") == "11.1.0.0/16"
        assert addresses.network_key("2d00:1:2:3::1") == "2d00:1:2::/48"
        for text in ("example.org", "/dns4/example.org/tcp/1", f"/p2p/{ALICE}"):
            with pytest.raises(AddressError):
                addresses.subnet_key(text)


class TestTargets:
    @pytest.mark.parametrize(
        ("text", "kind", "shown", "address"),
        [
            ("11.0.0.1:16111", TargetKind.HOST, "11.0.0.1:16111", "/ip4/11.0.0.1/tcp/16111"),
            (" [2d00::1]:16111 ", TargetKind.HOST, "[2d00::1]:16111", "/ip6/2d00::1/tcp/16111"),
            ("example.org:16111", TargetKind.HOST, "example.org:16111", "/dns/example.org/tcp/16111"),
            ("/ip4/11.0.0.1/tcp/1", TargetKind.MULTIADDR, "/ip4/11.0.0.1/tcp/1", "/ip4/11.0.0.1/tcp/1"),
            (CIRCUIT, TargetKind.MULTIADDR, CIRCUIT, CIRCUIT),
            (ALICE, TargetKind.PEER, ALICE, None),
            (f"/p2p/{ALICE}", TargetKind.PEER, ALICE, None),
            (f"/ipfs/{ALICE}", TargetKind.PEER, ALICE, None),
        ],
    )
    def test_forms(self, text: str, kind: TargetKind, shown: str, address: str | None) -> None:
        target = addresses.parse_target(text)
        assert (target.kind, str(target)) == (kind, shown)
        assert target.address == (None if address is None else addresses.parse(address))

    def test_peer(self) -> None:
        assert addresses.parse_target(CIRCUIT).peer == BOB
        assert addresses.parse_target(addresses.peer_id_to_cid(ALICE)).peer == ALICE
        assert addresses.parse_target("11.0.0.1:1").peer is None

    @pytest.mark.parametrize(
        ("text", "helps"),
        [
            ("11.0.0.1", "11.0.0.1:16111"),
            ("[2d00::1]", r"\[2d00::1\]:16111"),
            ("2d00::1:16111", r"\[2001:db8::1\]:16111"),
            ("11.0.0.1:0", "1 to 65535"),
            ("11.0.0.1:65536", "1 to 65535"),
            ("11.0.0.1:x", "1 to 65535"),
            ("[11.0.0.1]:1", "brackets"),
            ("300.0.0.1:1", "no IP"),
            ("exa mple:1", "value for /dns"),
            ("", "host:port"),
            ("nonsense", "host:port"),
            ("/ip4/11.0.0.1", ""),
        ],
    )
    def test_what_helps(self, text: str, helps: str) -> None:
        if not helps:
            assert addresses.ip_port(addresses.parse_target(text).address or "") is None
            return
        with pytest.raises(AddressError, match=helps):
            addresses.parse_target(text)

    @given(ips, st.integers(1, 65535))
    def test_ip_and_port(self, ip: str, port: int) -> None:
        text = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        target = addresses.parse_target(text)
        assert target.address == addresses.from_ip_port(ip, port)

    @given(st.text(max_size=40))
    def test_any_text_is_a_target_or_an_address_error(self, text: str) -> None:
        try:
            target = addresses.parse_target(text)
        except AddressError:
            return
        assert addresses.parse_target(str(target)) == target
