"""The RPC client against a real kaspad: every call that it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kas_bridge.simnet.mine import Chain, Wallet
from kas_libp2p.errors import RpcError
from kas_libp2p.kaspa.rpc import KaspadRpc
from tests.kaspad.conftest import MakeNode

pytestmark = pytest.mark.kaspad

PLENTY = 30.0
"""Seconds for anything here, on a busy machine."""


async def until_peers(rpc: KaspadRpc, count: int) -> list[str]:
    """Wait until a node has so many peers; their addresses."""
    with trio.fail_after(PLENTY):
        while len(peers := await rpc.get_connected_peer_info()) != count:  # noqa: ASYNC110 (nothing tells)
            await trio.sleep(0.05)
    return [each.address for each in peers]


async def test_peers_are_added_banned_and_pardoned(make_node: MakeNode) -> None:
    node, other = await make_node(unsafe_rpc=True), await make_node()
    there = f"{other.host}:{other.p2p_port}"
    async with node.rpc() as rpc, other.rpc() as theirs:
        await rpc.add_peer(there)
        assert await until_peers(rpc, 1) == [there]
        (peer,) = await rpc.get_connected_peer_info()
        assert peer.isOutbound
        assert peer.id == (await theirs.get_info()).p2pId
        assert peer.advertisedProtocolVersion == 11
        await rpc.ban(other.host)
        assert await until_peers(rpc, 0) == []
        await rpc.unban(other.host)
        with pytest.raises(RpcError, match="banned"):
            await rpc.unban(other.host)


async def test_what_a_node_tells_of_itself(make_node: MakeNode, chain: Chain, tmp_path: Path) -> None:
    node = await make_node(folder=chain.use(tmp_path / "node"), mining=True, utxo_index=True)
    async with node.rpc() as rpc:
        info, server, dag = await rpc.get_info(), await rpc.get_server_info(), await rpc.get_block_dag_info()
        assert info.serverVersion == server.serverVersion == "2.1.0"
        assert server.networkId == "simnet"
        assert info.isSynced == server.isSynced == await rpc.get_sync_status()
        assert info.isUtxoIndexed
        assert server.hasUtxoIndex
        assert dag.networkName == "kaspa-simnet"
        assert dag.virtualDaaScore == server.virtualDaaScore == chain.blocks
        assert dag.sink in dag.tipHashes


async def test_a_transaction_is_understood(make_node: MakeNode, chain: Chain, tmp_path: Path) -> None:
    node = await make_node(folder=chain.use(tmp_path / "node"), mining=True)
    async with node.rpc() as rpc:
        transaction, _, change = Wallet().spend(chain.coins[0], b"payload")
        # It is looked at to the last step, the fee, which our wallet pays none of; and it is named as we name it.
        with pytest.raises(RpcError, match=f"{change.transaction}.* fee"):
            await rpc.submit_transaction(transaction)
        transaction.inputs[0].signatureScript = "41" + 65 * "00"
        with pytest.raises(RpcError, match="signature"):
            await rpc.submit_transaction(transaction)
