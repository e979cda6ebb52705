"""The verdict for every NAT type, as the machines give it when fed what such a NAT does."""

from __future__ import annotations

import pytest
import trio

from kas_libp2p.autonat.roles import Filtering, Mapping
from kas_libp2p.config import Role
from kas_libp2p.events import RoleChanged
from natlab import nat as natlab
from tests.autonat.world import PORT, world

MAPPING = {
    natlab.Mapping.NONE: Mapping.NONE,
    natlab.Mapping.EIM: Mapping.INDEPENDENT,
    natlab.Mapping.ADM: Mapping.DEPENDENT,
    natlab.Mapping.APDM: Mapping.DEPENDENT,
}
FILTERING = {
    natlab.Filtering.NONE: Filtering.OPEN,
    natlab.Filtering.EIF: Filtering.OPEN,
    natlab.Filtering.ADF: Filtering.ADDRESS,
    natlab.Filtering.APDF: Filtering.PORT,
}


@pytest.mark.parametrize("kind", natlab.TYPES)
async def test_verdict(kind: str, autojump_clock: trio.abc.Clock) -> None:
    nat = natlab.nat_named(natlab.chain_of(kind)[0])
    filtering = (
        FILTERING[nat.filtering] if len(natlab.chain_of(kind)) == 1 else Filtering.PORT
    )  # the home's filters too
    public = filtering is Filtering.OPEN
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer("11.9.0.1", kind, serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(60)
        status = alice.reachability.status()
        assert status.role is (Role.PUBLIC if public else Role.PRIVATE), status
        assert (status.mapping, status.filtering) == (MAPPING[nat.mapping], filtering), status
        assert status.keeps_port is (nat.port is natlab.Port.KEEP)
        assert alice.reachability.offers_hop is public
        assert alice.reachability.offers_dcutr
        assert len(status.public_addresses) == public
        assert len(alice.bus.of(RoleChanged)) == public
        assert all(port != PORT for server in servers for port, _ in server.host.fresh)
