"""What a node finds out about a real NAT before it, and how fast."""

from __future__ import annotations

import pytest
import trio

from kas_libp2p import Config, open_node
from kas_libp2p.autonat.roles import Filtering, Mapping, ReachabilityStatus
from kas_libp2p.config import Role
from kas_libp2p.events import ReachabilityTested
from natlab import Host, RunningLab
from natlab import nat as natlab

pytestmark = pytest.mark.lab

CONFIG = Config(listen=("/ip4/0.0.0.0/tcp/16117",))
MAPPINGS = {
    natlab.Mapping.NONE: Mapping.NONE,
    natlab.Mapping.EIM: Mapping.INDEPENDENT,
    natlab.Mapping.ADM: Mapping.DEPENDENT,
    natlab.Mapping.APDM: Mapping.DEPENDENT,
}
FILTERINGS = {
    natlab.Filtering.NONE: Filtering.OPEN,
    natlab.Filtering.EIF: Filtering.OPEN,
    natlab.Filtering.ADF: Filtering.ADDRESS,
    natlab.Filtering.APDF: Filtering.PORT,
}


async def serve(peers: list[str]) -> None:
    """A public node that is connected to these."""
    async with open_node(CONFIG) as node:
        for peer in peers:
            await node.identify(peer)
        print(*node.addresses, sep="\n", flush=True)
        while True:  # a relay keeps its connections, as nodes with something to say to one another do
            await trio.sleep(20)
            for peer in peers:
                await node.ping(peer)


async def find_out(servers: list[str], public_ip: str) -> tuple[ReachabilityStatus, tuple[str, ...], float]:
    """What a node knows and tells once three servers have tested its public address, and the seconds until then."""
    async with open_node(CONFIG) as node:
        events = node.events()
        started = trio.current_time()
        for server in servers:
            await node.identify(server)
        tested: set[str] = set()
        with trio.fail_after(50):
            async for event in events:
                if isinstance(event, ReachabilityTested) and public_ip in event.address:
                    tested.add(event.by)
                status = node.status().reachability
                if len(tested) == len(servers) and status.filtering is not Filtering.UNKNOWN:
                    return status, node.addresses, trio.current_time() - started
        raise AssertionError


def address_of(host: Host, peers: list[str]) -> str:
    return host.spawn_python(serve, peers).expect(rf"^/ip4/{host.address}/\S+$")[0]


@pytest.mark.nat_types("open", "fw", "fc", "fcx", "ar", "pr-rst", "naive", "eimx", "adm", "sym", "cgn-fc")
def test_the_verdict(lab: RunningLab, nat_type: str) -> None:
    servers = [address_of(lab.public(name), []) for name in ("ashburn", "frankfurt", "singapore")]
    address_of(lab.public("stranger"), servers)
    alice = lab.home("alice", nat=nat_type, delay="10ms")
    status, told, seconds = alice.python(find_out, servers, alice.public_address)

    chain = natlab.chain_of(nat_type)
    nat = natlab.nat_named(chain[0])
    filtering = FILTERINGS[nat.filtering] if len(chain) == 1 else Filtering.PORT
    assert (status.mapping, status.filtering) == (MAPPINGS[nat.mapping], filtering)
    assert status.keeps_port is (nat.port is natlab.Port.KEEP)
    assert status.role is (Role.PUBLIC if filtering is Filtering.OPEN else Role.PRIVATE)
    assert len(status.public_addresses) == (filtering is Filtering.OPEN)
    assert any(alice.public_address in each for each in told) is (filtering is Filtering.OPEN)
    print(f"{nat_type}: {status.role}, {status.mapping}, {status.filtering} after {seconds:.1f} s: {status.reason}")
