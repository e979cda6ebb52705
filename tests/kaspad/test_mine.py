"""Blocks: their formats against known answers, and their validity against a real node."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kas_bridge.simnet.mine import FULL, LANES, Chain, Coin, Miner, Wallet, address_of, filled_chain, merkle_root
from tests.kaspad.conftest import MakeNode


def test_address() -> None:
    # The key of the secret 1, secp256k1's generator point; the addresses are what the official SDK (kaspa 2.1.0) gives.
    key = bytes.fromhex("79be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798")
    assert address_of(key) == "kaspasim:qpumuen7l8wthtz45p3ftn58pvrs9xlumvkuu2xet8egzkcklqtes65ue9mw6"
    assert address_of(key, "kaspa") == "kaspa:qpumuen7l8wthtz45p3ftn58pvrs9xlumvkuu2xet8egzkcklqtes4ypce9sf"


def branch(left: bytes, right: bytes) -> bytes:
    return hashlib.blake2b(left + right, digest_size=32, key=b"MerkleBranchHash").digest()


def test_merkle_root() -> None:
    a, b, c = (bytes([value]) * 32 for value in (1, 2, 3))
    assert merkle_root([a]) == a
    assert merkle_root([a, b]) == branch(a, b)
    assert merkle_root([a, b, c]) == branch(branch(a, b), branch(c, bytes(32)))
    assert merkle_root([a, b, c, a, b]) == branch(
        branch(branch(a, b), branch(c, a)), branch(branch(b, bytes(32)), bytes(32))
    )


def test_a_coin_is_passed_on_whole() -> None:
    wallet = Wallet()
    coin = Coin("ab" * 32, 3, 5_000_000_000)
    transaction, leaf, change = wallet.spend(coin, b"payload")
    assert (transaction.inputs[0].previousOutpoint.transactionId, transaction.inputs[0].previousOutpoint.index) == (
        coin.transaction,
        coin.index,
    )
    assert change == Coin(change.transaction, 0, coin.amount)
    assert len(leaf) == 32
    assert len(bytes.fromhex(transaction.inputs[0].signatureScript)) == 66
    other = wallet.spend(coin, b"another")[2]
    assert other.transaction != change.transaction


@pytest.mark.kaspad
async def test_filled_blocks_are_accepted_with_all_their_transactions(
    make_node: MakeNode, chain: Chain, tmp_path: Path
) -> None:
    node = await make_node(folder=chain.use(tmp_path / "node"), mining=True, utxo_index=True)
    async with node.rpc() as rpc:
        assert (await rpc.get_block_dag_info()).virtualDaaScore == chain.blocks
        miner = chain.miner(rpc)
        blocks = await rpc.notify_block_added()
        await miner.mine(3, FULL)
        # Not only accepted as a block: its transactions changed the state, or their outputs would not be there.
        entries = await rpc.get_utxos_by_addresses([Wallet().address])
        unspent = {(entry.outpoint.transactionId, entry.outpoint.index) for entry in entries}
        assert {(coin.transaction, coin.index) for coin in miner.coins} <= unspent
        for _ in range(3):
            block = await anext(blocks)
            assert len(block.transactions) == 1 + LANES
            content = sum(len(transaction.payload) for transaction in block.transactions[1:]) // 2
            assert 0.98 * FULL < content < FULL


@pytest.mark.kaspad
async def test_a_block_can_not_hold_more_than_consensus_allows(
    make_node: MakeNode, chain: Chain, tmp_path: Path
) -> None:
    node = await make_node(folder=chain.use(tmp_path / "node"), mining=True)
    async with node.rpc() as rpc:
        miner = chain.miner(rpc)
        for size in (250_001, 10):
            with pytest.raises(ValueError, match="250000"):
                await miner.template(size)
        await miner.mine(1, 249_900)


@pytest.mark.kaspad
async def test_a_node_without_coins_can_be_funded(make_node: MakeNode) -> None:
    node = await make_node(mining=True, utxo_index=True)
    async with node.rpc() as rpc:
        miner = Miner(rpc)
        with pytest.raises(RuntimeError, match="no coins"):
            await miner.template(FULL)
        await miner.fund()
        assert len(miner.coins) == LANES
        await miner.mine(2, FULL)


@pytest.mark.kaspad
async def test_a_chain_is_made_once_and_a_copy_leaves_it_alone(
    kaspad: Path, make_node: MakeNode, tmp_path: Path
) -> None:
    told: list[str] = []
    cache = tmp_path / "cache"
    first = await filled_chain(kaspad, 2, progress=lambda what, *_: told.append(what), cache=cache)
    assert set(told) == {"empty blocks", "full blocks"}
    told.clear()
    again = await filled_chain(kaspad, 2, progress=lambda what, *_: told.append(what), cache=cache)
    assert (again, told) == (first, [])
    content = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    node = await make_node(folder=first.use(tmp_path / "copy"), mining=True)
    async with node.rpc() as rpc:
        await first.miner(rpc).mine(5, FULL)
    await node.stop()
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == content
