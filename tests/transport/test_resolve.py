from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from kas_libp2p.errors import AddressError, ResolveError, Stage
from kas_libp2p.transport import resolve as module
from kas_libp2p.transport.resolve import Family, SystemNames, resolve, resolve_all

ALICE = "12D3KooWHHzSeKaY8xuZVzkLbKFfvNgPPeKhFBGrMbNzbm5akpqu"
BOB = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


class FakeNames:
    """Hosts by name; TXT records by name without the ``_dnsaddr.`` before it. ``None`` never answers."""

    def __init__(self, hosts: dict[str, list[str] | None] | None = None, **texts: list[str] | None) -> None:
        self._hosts = hosts or {}
        self._texts = texts
        self.asked: list[str] = []

    async def hosts(self, name: str, family: Family) -> list[str]:
        self.asked.append(name)
        found = await self._answer(self._hosts, name)
        return [ip for ip in found if family is None or (family == 6) == (":" in ip)]

    async def texts(self, name: str) -> list[str]:
        self.asked.append(name)
        return await self._answer(self._texts, name.removeprefix("_dnsaddr."))

    @staticmethod
    async def _answer(table: dict[str, list[str] | None], name: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        if name not in table:
            raise ResolveError(f"{name}: there is no such name")
        answer = table[name]
        if answer is None:
            await trio.sleep_forever()
        return answer or []


async def resolved(text: str, names: FakeNames) -> list[str]:
    return [str(each) for each in await resolve(text, names=names)]


class TestHosts:
    NAMES = FakeNames({"both": ["2d00::1", "11.0.0.1"], "four": ["11.0.0.4"], "local": ["fe80::1%eth0"]})

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("/dns/both/tcp/1", ["/ip6/2d00::1/tcp/1", "/ip4/11.0.0.1/tcp/1"]),
            ("/dns4/both/tcp/1", ["/ip4/11.0.0.1/tcp/1"]),
            ("/dns6/both/tcp/1", ["/ip6/2d00::1/tcp/1"]),
            (f"/dns4/four/tcp/1/p2p/{ALICE}", [f"/ip4/11.0.0.4/tcp/1/p2p/{ALICE}"]),
            (
                f"/dns4/four/tcp/1/p2p/{ALICE}/p2p-circuit/p2p/{BOB}",
                [f"/ip4/11.0.0.4/tcp/1/p2p/{ALICE}/p2p-circuit/p2p/{BOB}"],
            ),
            ("/dns/local/tcp/1", ["/ip6zone/eth0/ip6/fe80::1/tcp/1"]),
        ],
    )
    async def test_names_become_addresses(self, text: str, expected: list[str]) -> None:
        assert await resolved(text, self.NAMES) == expected

    async def test_without_a_name_nobody_is_asked(self) -> None:
        names = FakeNames()
        assert await resolved("/ip4/11.0.0.1/tcp/1", names) == ["/ip4/11.0.0.1/tcp/1"]
        assert names.asked == []

    async def test_no_such_name(self) -> None:
        with pytest.raises(ResolveError, match="nowhere: there is no such name"):
            await resolved("/dns/nowhere/tcp/1", self.NAMES)

    async def test_none_of_the_family(self) -> None:
        with pytest.raises(ResolveError, match="/dns6/four/tcp/1 leads to no address"):
            await resolved("/dns6/four/tcp/1", self.NAMES)

    async def test_no_answer(self, autojump_clock: MockClock) -> None:
        with pytest.raises(ResolveError, match=r"silent: no answer within 5 s"):
            await resolved("/dns/silent/tcp/1", FakeNames({"silent": None}))
        assert trio.current_time() == pytest.approx(5)

    async def test_a_name_with_thousands_of_addresses(self) -> None:
        names = FakeNames({"many": [f"11.0.{n >> 8}.{n & 255}" for n in range(5000)]})
        assert len(await resolved("/dns/many/tcp/1", names)) == module.MAX_ADDRESSES

    async def test_no_address_at_all(self) -> None:
        with pytest.raises(AddressError):
            await resolve("nonsense", names=FakeNames())


class TestRecords:
    async def test_records_in_their_order(self) -> None:
        names = FakeNames(a=["dnsaddr=/ip4/11.0.0.2/tcp/1", "dnsaddr=/ip4/11.0.0.1/tcp/1"])
        assert await resolved("/dnsaddr/a", names) == ["/ip4/11.0.0.2/tcp/1", "/ip4/11.0.0.1/tcp/1"]

    async def test_the_suffix_selects(self) -> None:
        names = FakeNames(
            a=[
                f"dnsaddr=/ip4/11.0.0.1/tcp/1/p2p/{ALICE}",
                f"dnsaddr=/ip4/11.0.0.2/tcp/1/p2p/{BOB}",
                "dnsaddr=/ip4/11.0.0.3/tcp/1",
                f"dnsaddr=/ip4/11.0.0.4/tcp/1/ipfs/{BOB}",
            ]
        )
        expected = [f"/ip4/11.0.0.{n}/tcp/1/p2p/{BOB}" for n in (2, 4)]
        assert await resolved(f"/dnsaddr/a/p2p/{BOB}", names) == expected

    async def test_nobody_has_the_suffix(self) -> None:
        names = FakeNames(a=[f"dnsaddr=/ip4/11.0.0.1/tcp/1/p2p/{ALICE}"])
        with pytest.raises(ResolveError, match=f"none of its 1 dnsaddr records has /p2p/{BOB}"):
            await resolved(f"/dnsaddr/a/p2p/{BOB}", names)

    async def test_other_records_and_unknown_transports_are_passed_over(self) -> None:
        names = FakeNames(a=["v=spf1 -all", "dnsaddr=/warp9/1", "dnsaddr=", "dnsaddr=/ip4/11.0.0.1/tcp/1"])
        assert await resolved("/dnsaddr/a", names) == ["/ip4/11.0.0.1/tcp/1"]

    async def test_no_records(self) -> None:
        with pytest.raises(ResolveError, match="a: has no dnsaddr records"):
            await resolved("/dnsaddr/a", FakeNames(a=["v=spf1 -all"]))

    async def test_records_lead_to_names(self) -> None:
        names = FakeNames(
            {"h": ["11.0.0.9"]},
            a=[f"dnsaddr=/dnsaddr/b/p2p/{BOB}", f"dnsaddr=/dns4/h/tcp/1/p2p/{BOB}"],
            b=[f"dnsaddr=/ip4/11.0.0.1/tcp/1/p2p/{BOB}", f"dnsaddr=/ip4/11.0.0.2/tcp/1/p2p/{ALICE}"],
        )
        expected = [f"/ip4/11.0.0.1/tcp/1/p2p/{BOB}", f"/ip4/11.0.0.9/tcp/1/p2p/{BOB}"]
        assert await resolved(f"/dnsaddr/a/p2p/{BOB}", names) == expected

    async def test_one_dead_name_does_not_hide_the_others(self, autojump_clock: MockClock) -> None:
        names = FakeNames(a=["dnsaddr=/dnsaddr/b", "dnsaddr=/dnsaddr/gone", "dnsaddr=/ip4/11.0.0.1/tcp/1"], b=None)
        assert await resolved("/dnsaddr/a", names) == ["/ip4/11.0.0.1/tcp/1"]
        assert trio.current_time() == pytest.approx(5)

    async def test_a_loop_ends(self) -> None:
        names = FakeNames(a=["dnsaddr=/dnsaddr/b"], b=["dnsaddr=/dnsaddr/a"])
        with pytest.raises(ResolveError):
            await resolved("/dnsaddr/a", names)
        assert len(names.asked) == 2

    async def test_a_chain_ends(self) -> None:
        names = FakeNames(**{f"n{i}": [f"dnsaddr=/dnsaddr/n{i + 1}"] for i in range(100)})
        with pytest.raises(ResolveError, match="too many names"):
            await resolved("/dnsaddr/n0", names)
        assert len(names.asked) == module.MAX_DEPTH

    async def test_a_tree_ends(self) -> None:
        names = FakeNames(
            **{f"n{i}": [f"dnsaddr=/dnsaddr/n{i * 10 + j}" for j in range(10)] for i in range(1, 2000)},
            n0=[f"dnsaddr=/dnsaddr/n{j}" for j in range(1, 200)],
        )
        with pytest.raises(ResolveError, match="too many names"):
            await resolved("/dnsaddr/n0", names)
        assert len(names.asked) == module.MAX_QUESTIONS


class TestSeveral:
    async def test_results_in_order_and_a_reason_for_each_failure(self, autojump_clock: MockClock) -> None:
        names = FakeNames({"h": ["11.0.0.2"], "silent": None})
        found, failures = await resolve_all(
            ["/dns/silent/tcp/1", "/ip4/11.0.0.1/tcp/1", "/dns/h/tcp/1", "/dns/nowhere/tcp/1", "nonsense"], names=names
        )
        assert [str(each) for each in found] == ["/ip4/11.0.0.1/tcp/1", "/ip4/11.0.0.2/tcp/1"]
        assert [(each.address, each.stage, each.seconds) for each in failures] == [
            ("/dns/silent/tcp/1", Stage.RESOLVE, pytest.approx(5)),
            ("/dns/nowhere/tcp/1", Stage.RESOLVE, 0),
            ("nonsense", Stage.RESOLVE, 0),
        ]

    async def test_a_peer_with_thousands_of_names(self) -> None:
        names = FakeNames({f"h{n}": ["11.0.0.1"] for n in range(1000)})
        found, failures = await resolve_all(
            [*(f"/dns/h{n}/tcp/{n}" for n in range(1000)), "/ip4/11.0.0.2/tcp/1"], names=names
        )
        assert len(names.asked) == module.MAX_NAMES
        assert len(found) == module.MAX_NAMES + 1
        assert str(found[-1]) == "/ip4/11.0.0.2/tcp/1"
        assert len(failures) == 1000 - module.MAX_NAMES
        assert "more than 16 names" in str(failures[0])


class TestSystem:
    """The real resolvers: the system's for numbers and localhost, dnspython's against a server on loopback."""

    async def test_hosts(self) -> None:
        names = SystemNames()
        assert await names.hosts("127.0.0.1", 4) == ["127.0.0.1"]
        assert await names.hosts("localhost", 4) == ["127.0.0.1"]

    @pytest.mark.parametrize("name", ["a" * 64, "a..b", "x." * 150])
    async def test_what_dns_can_not_carry(self, name: str) -> None:
        with pytest.raises(ResolveError):
            await SystemNames().hosts(name, None)
        with pytest.raises(ResolveError):
            await SystemNames(["127.0.0.1"]).texts(name)

    async def test_txt_records(self) -> None:
        record = f'"dnsaddr=/ip4/11.0.0.1/tcp/1" "/p2p/{ALICE}"'  # two strings are one text
        async with dns_server({"_dnsaddr.example.org.": [record, '"other"'], "empty.example.org.": []}) as names:
            assert await resolved_by(names, "/dnsaddr/example.org") == [f"/ip4/11.0.0.1/tcp/1/p2p/{ALICE}"]
            assert await names.texts("empty.example.org") == []
            with pytest.raises(ResolveError, match="there is no such name"):
                await resolved_by(names, "/dnsaddr/nowhere.example.org")

    async def test_a_forged_answer_that_does_not_fit_is_passed_over(self) -> None:
        zone = {"_dnsaddr.example.org.": ["dnsaddr=/ip4/11.0.0.1/tcp/1"]}
        async with dns_server(zone, before=b"\xff" * 40) as names:
            assert await resolved_by(names, "/dnsaddr/example.org") == ["/ip4/11.0.0.1/tcp/1"]


async def resolved_by(names: SystemNames, text: str) -> list[str]:
    return [str(each) for each in await resolve(text, names=names)]


@asynccontextmanager
async def dns_server(zone: dict[str, list[str]], *, before: bytes = b"") -> AsyncIterator[SystemNames]:
    """A name server on loopback that knows TXT records."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))

        async def serve() -> None:
            while True:
                data, client = await sock.recvfrom(4096)
                if before:
                    await sock.sendto(before, client)
                await sock.sendto(answer(data), client)

        def answer(data: bytes) -> bytes:
            query = dns.message.from_wire(data)
            response = dns.message.make_response(query)
            name = query.question[0].name
            records = zone.get(str(name))
            if records is None:
                response.set_rcode(dns.rcode.NXDOMAIN)
            elif records:
                response.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *records))
            return response.to_wire()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield SystemNames(["127.0.0.1"], sock.getsockname()[1])
            nursery.cancel_scope.cancel()
