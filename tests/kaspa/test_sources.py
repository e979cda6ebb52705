from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import ConfigError
from kas_libp2p.kaspa._sources import FORMAT, LEFT_OUT, PoolExhausted, SourceTable
from kas_libp2p.kaspa.sources import FixedSource, PoolSources
from kas_libp2p.metadata import PeerId


def peer(number: int) -> PeerId:
    return PeerId(f"12D3KooW{number}")


def test_each_peer_gets_its_own_and_keeps_it() -> None:
    table = SourceTable()
    addresses = [table.take(peer(n), 0.0)[0] for n in range(1000)]
    assert len(set(addresses)) == 1000
    assert not any(ipaddress.ip_address(address) in LEFT_OUT for address in addresses)
    assert addresses[0] == "127.1.0.1"
    assert [table.take(peer(n), 1.0) for n in range(1000)] == [(address, False) for address in addresses]


@pytest.mark.parametrize("pool", ["127.0.0.0/8", "127.0.0.0/15"])
def test_the_beginning_of_loopback_is_left_out(pool: str) -> None:
    table = SourceTable([pool])
    address, _ = table.take(peer(1), 0.0)
    assert address == "127.1.0.0" or address == "127.1.0.1"
    assert ipaddress.ip_address(address) not in LEFT_OUT


def test_unless_it_was_asked_for() -> None:
    assert SourceTable(["127.0.5.0/24"]).take(peer(1), 0.0) == ("127.0.5.1", True)
    assert SourceTable(["10.0.0.7"]).take(peer(1), 0.0) == ("10.0.0.7", True)


def test_the_least_recently_used_goes_when_the_pool_is_exhausted() -> None:
    table = SourceTable(["127.9.0.0/30"])
    assert table.take(peer(1), 0.0) == ("127.9.0.1", True)
    assert table.take(peer(2), 0.0) == ("127.9.0.2", True)
    with pytest.raises(PoolExhausted):
        table.take(peer(3), 1.0)
    table.give_back(peer(1), 2.0)
    table.give_back(peer(2), 3.0)
    assert table.take(peer(1), 4.0) == ("127.9.0.1", False)
    table.give_back(peer(1), 5.0)
    assert table.take(peer(3), 6.0) == ("127.9.0.2", True)
    assert peer(2) not in table
    assert table.take(peer(4), 7.0) == ("127.9.0.1", True)


def test_several_networks_are_one_pool() -> None:
    table = SourceTable(["10.1.0.0/31", "10.2.0.5"])
    assert [table.take(peer(n), 0.0)[0] for n in range(3)] == ["10.1.0.0", "10.1.0.1", "10.2.0.5"]


@pytest.mark.parametrize("pool", [[], ["nonsense"], ["fd00::/64"], ["127.0.0.1/8"]])
def test_a_wrong_pool_is_refused(pool: list[str]) -> None:
    with pytest.raises(ConfigError, match="pool of source addresses"):
        SourceTable(pool)


moves = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60)


@given(moves=moves, bits=st.integers(27, 30), max_entries=st.integers(1, 12))
def test_never_two_peers_on_one_address_and_none_taken_while_in_use(
    moves: list[tuple[int, bool]], bits: int, max_entries: int
) -> None:
    table = SourceTable([f"127.9.0.0/{bits}"], max_entries=max_entries)
    held: dict[PeerId, list[str]] = {}
    for now, (number, take) in enumerate(moves):
        who = peer(number)
        if take:
            try:
                address, _ = table.take(who, now)
            except PoolExhausted:
                assert len(held) >= min(max_entries, 2 ** (32 - bits) - 2)
                continue
            held.setdefault(who, []).append(address)
        elif who in held:
            table.give_back(who, now)
            held[who].pop()
            if not held[who]:
                del held[who]
        entries = table.entries()
        addresses = [entry.address for entry in entries.values()]
        assert len(set(addresses)) == len(addresses) <= max_entries
        for who, uses in held.items():
            assert {entries[who].address} == set(uses)
            assert entries[who].in_use == len(uses)
    again = SourceTable([f"127.9.0.0/{bits}"], max_entries=max_entries)
    assert again.load(table.dump()) == 0
    assert [(who, entry.address) for who, entry in again.entries().items()] == [
        (who, entry.address) for who, entry in table.entries().items()
    ]
    for number in range(10, 30):
        before = {entry.address for entry in again.entries().values()}
        try:
            address, _ = again.take(peer(number), 0)
        except PoolExhausted:
            break
        assert address not in before or peer(number) in again


def test_what_does_not_fit_is_left_out() -> None:
    table = SourceTable(["127.1.0.0/24"])
    text = json.dumps(
        {
            "version": FORMAT,
            "peers": [
                ["a", "127.1.0.1", 1],
                ["b", "127.1.0.1", 1],  # taken
                ["a", "127.1.0.2", 1],  # has one
                ["c", "127.2.0.1", 1],  # another pool
                ["d", "127.1.0.0", 1],  # the network itself
                ["e", "no address", 1],
                ["f", 5, 1],
                ["g", "127.1.0.9"],
                ["h", "127.1.0.3", "later"],
                None,
                ["i", "127.1.0.4", 2],
            ],
        }
    )
    assert table.load(text) == 9
    assert {who: entry.address for who, entry in table.entries().items()} == {"a": "127.1.0.1", "i": "127.1.0.4"}
    assert table.take(PeerId("new"), 0.0)[0] == "127.1.0.2"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version":2,"peers":[]}', '{"version":1,"peers":{}}', "nul"])
def test_what_is_no_table_is_said_so(text: str) -> None:
    with pytest.raises(ValueError):
        SourceTable().load(text)


def test_the_file_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sources.json"
    first = PoolSources(path=path)
    with first.lease(peer(1)) as one, first.lease(peer(2)) as two:
        assert one != two
    again = PoolSources(path=path)
    assert again.problem is None
    with again.lease(peer(2)) as address:
        assert address == two
    assert again.address_of(peer(1)) == one
    assert [entry.in_use for entry in again.entries().values()] == [0, 0]
    assert list(path.parent.iterdir()) == [path], "nothing else is left behind"


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "sources.json"
    path.write_text("{ no")
    sources = PoolSources(path=path)
    assert sources.problem is not None
    assert "assigned anew" in sources.problem
    with sources.lease(peer(1)):
        pass
    assert (tmp_path / "sources.json.damaged").read_text() == "{ no"
    assert PoolSources(path=path).address_of(peer(1)) == "127.1.0.1"


def test_a_folder_that_is_not_writable_costs_nothing_but_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sources = PoolSources(path=tmp_path / "file" / "sources.json")
    with sources.lease(peer(1)) as address:
        assert address == "127.1.0.1"
    assert sources.problem is not None
    assert "can't be" in sources.problem


def test_one_address_for_all() -> None:
    for address in (None, "10.0.0.5"):
        sources = FixedSource(address)
        with sources.lease(peer(1)) as one, sources.lease(peer(2)) as two:
            assert one == two == address == sources.address_of(peer(3))
