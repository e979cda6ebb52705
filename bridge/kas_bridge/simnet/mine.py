"""Blocks on simnet: empty ones, and ones filled with signed transactions.

Simnet skips proof of work, so a block is a template that comes back. To fill one, we put transactions of our own into
an empty template and set the Merkle root anew: consensus checks them as it does any others, and no mempool is involved,
so a block's time on the way from node to node is the block's alone. The transactions are real: each spends the output
of the one before it (a *lane*), is signed (Schnorr), and carries a payload that does not compress, like the signatures
and hashes that real blocks consist of. 240 kB per block are 96 % of what consensus allows: a block may have 1 000 000
grams of transient mass at 4 grams per byte (KIP-13), so 250 000 bytes of transactions. The coin of a coinbase can be
spent after 1000 blocks.

Formats (read in rusty-kaspa 2.1.0, crate kaspa-consensus-core: ``hashing::tx``, ``hashing::sighash``, ``merkle``):
hashes are BLAKE2b-256 keyed by their purpose, integers little-endian, byte strings preceded by their length in 8 bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import coincurve
import trio

from kas_bridge.simnet.node import VERSION, cache_folder, simnet_node
from kas_libp2p.kaspa import rpc_pb2
from kas_libp2p.kaspa.rpc import KaspadRpc

MATURITY = 1000
"""Blocks after which the coins of a coinbase can be spent: 100 s at 10 blocks per second."""
LANES = 10
"""Transactions in one filled block."""
FULL = 240_000
"""Bytes of transactions in a filled block, out of 250 000 that consensus allows."""
LIMIT = 250_000

Progress = Callable[[str, int, int], None]
"""Is told what is going on, how much is done, and of how much."""

_NATIVE = bytes(20)
_SIGHASH_ALL = b"\x01"
_OVERHEAD = 264
"""Bytes of a transaction with one input and one output, as consensus counts them, without its payload."""


def quiet(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody looks at."""


def _hash(purpose: bytes, *parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=32, key=purpose)
    for part in parts:
        state.update(part)
    return state.digest()


def _sized(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def merkle_root(leaves: list[bytes]) -> bytes:
    """Kaspa's Merkle root: a branch without right child hashes zeros instead; an only leaf is the root."""
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [_hash(b"MerkleBranchHash", pair[0], pair[1] if len(pair) == 2 else bytes(32)) for pair in pairs]
    return leaves[0]


_CHARSET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x98F2BC8E61, 0x79B76D99E2, 0xF33E5FB3C4, 0xAE2EABE2A8, 0x1E4F43E470)


def _checksum(values: list[int]) -> int:
    state = 1
    for value in values:
        top = state >> 35
        state = (state & 0x7_FFFF_FFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATOR):
            if top >> bit & 1:
                state ^= generator
    return state ^ 1


def _five_bits(content: bytes) -> list[int]:
    bits = len(content) * 8
    number = int.from_bytes(content, "big") << -bits % 5
    return [number >> shift & 31 for shift in range((bits + -bits % 5) - 5, -1, -5)]


def address_of(public_key: bytes, prefix: str = "kaspasim") -> str:
    """The address of a Schnorr public key (32 bytes): cashaddr's Bech32 with version byte 0.

    The form is that of https://bch.info/en/specifications, with Kaspa's prefixes.
    """
    payload = _five_bits(b"\0" + public_key)
    checked = [ord(letter) & 31 for letter in prefix] + [0] + payload + [0] * 8
    checksum = _five_bits(_checksum(checked).to_bytes(5, "big"))
    return prefix + ":" + "".join(_CHARSET[value] for value in payload + checksum)


@dataclass(frozen=True, slots=True)
class Coin:
    """An output that can be spent.

    Attributes:
        transaction: id of its transaction, in hex.
        index: its place there.
        amount: in sompi (10^-8 KAS).
    """

    transaction: str
    index: int
    amount: int


class Wallet:
    """One key, its address, and transactions signed by it.

    Args:
        secret: 32 bytes. By default one that everybody knows: simnet's coins are worth nothing, and those of a chain in
            the cache can be spent.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        secret = secret or hashlib.sha256(b"kas-libp2p simnet").digest()
        self._key = coincurve.PrivateKey(secret)
        public = coincurve.PublicKeyXOnly.from_secret(secret).format()
        self.address = address_of(public)
        self.script = b"\x20" + public + b"\xac"  # OP_DATA_32 key OP_CHECKSIG

    def spend(self, coin: Coin, payload: bytes) -> tuple[rpc_pb2.RpcTransaction, bytes, Coin]:
        """Pay a coin to ourselves, whole: without a fee, which only a mempool asks for.

        Returns:
            The transaction, its hash (a leaf of the block's Merkle tree), and the new coin.
        """
        outpoint = bytes.fromhex(coin.transaction) + struct.pack("<I", coin.index)
        script = struct.pack("<H", 0) + _sized(self.script)
        output = struct.pack("<Q", coin.amount) + script
        zero = bytes(8)  # sequence, lock time and gas alike
        content = _sized(payload)
        purpose = b"TransactionSigningHash"
        digest = _hash(
            purpose,
            struct.pack("<H", 0),
            _hash(purpose, outpoint),
            _hash(purpose, zero),
            _hash(purpose, b"\x01"),
            outpoint,
            script,
            struct.pack("<Q", coin.amount),
            zero,
            b"\x01",
            _hash(purpose, output),
            zero,
            _NATIVE,
            zero,
            _hash(purpose, content),
            _SIGHASH_ALL,
        )
        signature = b"\x41" + self._key.sign_schnorr(digest) + _SIGHASH_ALL
        head, one = struct.pack("<HQ", 0, 1) + outpoint, struct.pack("<Q", 1)
        tail = [zero, one, output, zero, _NATIVE, zero, content]
        identity = _hash(b"TransactionID", head, bytes(8), *tail).hex()
        leaf = _hash(b"TransactionHash", head, _sized(signature), b"\x01", *tail)
        transaction = rpc_pb2.RpcTransaction(
            inputs=[
                rpc_pb2.RpcTransactionInput(
                    previousOutpoint=rpc_pb2.RpcOutpoint(transactionId=coin.transaction, index=coin.index),
                    signatureScript=signature.hex(),
                    sigOpCount=1,
                )
            ],
            outputs=[
                rpc_pb2.RpcTransactionOutput(
                    amount=coin.amount, scriptPublicKey=rpc_pb2.RpcScriptPublicKey(scriptPublicKey=self.script.hex())
                )
            ],
            subnetworkId=_NATIVE.hex(),
            payload=payload.hex(),
        )
        return transaction, leaf, Coin(identity, 0, coin.amount)


class Miner:
    """Makes blocks on one node (``mining=True``).

    Args:
        rpc: the node's RPC.
        coins: what a former miner left (`coins`), one for each lane.
        seed: of the payloads, which are random bytes.

    Attributes:
        coins: the coins that the next filled block spends.
    """

    def __init__(self, rpc: KaspadRpc, coins: list[Coin] | None = None, seed: int = 1) -> None:
        self._rpc = rpc
        self._wallet = Wallet()
        self._random = random.Random(seed)  # noqa: S311 - the same chain every time
        self.coins = coins or []

    async def template(self, size: int = 0) -> rpc_pb2.RpcBlock:
        """The next block, not submitted yet.

        Args:
            size: bytes of transactions that it is to hold, at most `LIMIT`; 0 for none.

        Raises:
            ValueError: the size is not possible.
            RuntimeError: there are no coins to fill it with; see `fund`.
        """
        block = await self._rpc.get_block_template(self._wallet.address)
        if not size:
            return block
        each = size // LANES - _OVERHEAD - 66  # the signature script has 66 bytes
        if size > LIMIT or each < 0:
            raise ValueError(f"a block holds {LANES * (_OVERHEAD + 66)} to {LIMIT} bytes of transactions, not {size}")
        if not self.coins:
            raise RuntimeError("no coins to fill a block with")
        if len(block.transactions) != 1:
            raise RuntimeError("the node's mempool is not empty")
        leaves = [bytes.fromhex(block.header.hashMerkleRoot)]  # of a tree with one leaf: the coinbase
        for lane, coin in enumerate(self.coins):
            transaction, leaf, self.coins[lane] = self._wallet.spend(coin, self._random.randbytes(each))
            block.transactions.append(transaction)
            leaves.append(leaf)
        block.header.hashMerkleRoot = merkle_root(leaves).hex()
        return block

    async def mine(self, count: int = 1, size: int = 0, progress: Progress = quiet) -> None:
        """Make blocks.

        Args:
            count: how many.
            size: bytes of transactions in each; 0 for empty blocks.
            progress: told after every block.
        """
        what = "full blocks" if size else "empty blocks"
        for done in range(1, count + 1):
            await self._rpc.submit_block(await self.template(size))
            progress(what, done, count)

    async def fund(self, progress: Progress = quiet) -> None:
        """Get a spendable coin for each lane, mining as many blocks as that takes. Needs the node's UTXO index."""
        while True:
            info = await self._rpc.get_block_dag_info()
            entries = await self._rpc.get_utxos_by_addresses([self._wallet.address])
            ripe = sorted(
                (
                    entry
                    for entry in entries
                    if not entry.utxoEntry.isCoinbase or entry.utxoEntry.blockDaaScore + MATURITY < info.virtualDaaScore
                ),
                key=lambda entry: (entry.utxoEntry.blockDaaScore, entry.outpoint.transactionId),
            )
            if len(ripe) >= LANES:
                self.coins = [
                    Coin(entry.outpoint.transactionId, entry.outpoint.index, entry.utxoEntry.amount)
                    for entry in ripe[:LANES]
                ]
                return
            await self.mine(max(LANES, MATURITY + LANES + 2 - info.virtualDaaScore), progress=progress)


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain on disk, ready to be served.

    Attributes:
        folder: a kaspad's folder. Don't start a node on it: `use` a copy.
        blocks: blocks in it, the genesis not counted.
        full: those of them that are filled.
        size: bytes of transactions in a filled block.
        coins: what a `Miner` needs to go on.
    """

    folder: Path
    blocks: int
    full: int
    size: int
    coins: tuple[Coin, ...]

    @property
    def bytes(self) -> int:
        """Bytes of transactions in all."""
        return self.full * self.size

    def miner(self, rpc: KaspadRpc) -> Miner:
        """A miner that goes on with this chain, on a node that runs on a copy of it."""
        return Miner(rpc, list(self.coins), seed=self.blocks)

    def use(self, target: Path) -> Path:
        """Put a copy into a folder that does not exist yet; returns it.

        Takes milliseconds: RocksDB never changes a table file once it is written, so those are linked.
        """

        def put(source: str, copy: str) -> None:
            if source.endswith(".sst"):
                try:
                    os.link(source, copy)
                    return
                except OSError:
                    pass  # another file system
            shutil.copy2(source, copy)

        shutil.copytree(self.folder, target, copy_function=put)
        return target


def _home(full: int, size: int, cache: Path | None) -> Path:
    return (cache or cache_folder()) / f"simnet-chain-{VERSION}" / f"{full}x{size}"


def is_made(full: int, size: int = FULL, cache: Path | None = None) -> bool:
    """Whether `filled_chain` has this chain in the cache."""
    return (_home(full, size, cache) / "chain.json").exists()


async def filled_chain(
    kaspad: Path, full: int = 1500, size: int = FULL, progress: Progress = quiet, cache: Path | None = None
) -> Chain:
    """A chain with filled blocks, from the cache or made now (about 20 s for the default one, 360 MB).

    The filled blocks come after the 1013 empty ones that it takes until the first coins can be spent.

    Args:
        kaspad: the binary that makes it.
        full: filled blocks.
        size: bytes of transactions in each.
        progress: told while it is made.
        cache: folder of chains instead of the usual one.
    """
    home = _home(full, size, cache)
    async with _locked(home):
        if not is_made(full, size, cache):
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            chain = await _make(kaspad, home / "node", full, size, progress)
            content = {"blocks": chain.blocks, "full": full, "size": size, "coins": [asdict(c) for c in chain.coins]}
            (home / "chain.part").write_text(json.dumps(content), encoding="ascii")
            (home / "chain.part").rename(home / "chain.json")
    content = json.loads((home / "chain.json").read_text(encoding="ascii"))
    content["coins"] = tuple(Coin(**coin) for coin in content["coins"])
    return Chain(folder=home / "node", **content)


async def _make(kaspad: Path, folder: Path, full: int, size: int, progress: Progress) -> Chain:
    async with (
        simnet_node(kaspad, folder, mining=True, utxo_index=bool(full)) as node,
        node.rpc() as rpc,
    ):
        miner = Miner(rpc)
        if full:
            await miner.fund(progress)
            await miner.mine(full, size, progress)
        blocks = (await rpc.get_block_dag_info()).virtualDaaScore
    return Chain(folder, blocks, full, size, tuple(miner.coins))


@asynccontextmanager
async def _locked(home: Path) -> AsyncIterator[None]:
    """One process at a time makes a chain; the others wait for it."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await trio.sleep(0.5)
        yield
