"""One kaspad on simnet, in a folder of its own, with the flags that it has by default as far as a test allows."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import trio

from kas_bridge.simnet.process import Process, ProcessEnded, within
from kas_bridge.simnet.wire import Namespace
from kas_libp2p.errors import KasError
from kas_libp2p.kaspa.rpc import KaspadRpc, open_rpc

VERSION = "2.1.0"
"""The kaspad that everything here was measured with."""

READY_TIMEOUT = 60.0
"""Seconds from start to an answering RPC. 0.15 on an idle machine; a killed node recovers its database first."""

LOOPBACK = "127.0.0.1"


class KaspadMissing(KasError):
    """There is no kaspad on this machine. The text says where was looked and how to get one."""


def cache_folder() -> Path:
    """Where builds and chains are kept: ``$KAS_CACHE``, or ``~/.cache/kas-libp2p``."""
    return Path(os.environ.get("KAS_CACHE") or Path.home() / ".cache" / "kas-libp2p")


def find_kaspad(given: str | Path | None = None) -> Path:
    """Find a kaspad.

    Looks at what is given, ``$KASPAD``, ``PATH``, and the cache that ``scripts/build-kaspad`` fills, in this order.

    Args:
        given: path of the binary; then nothing else is tried.

    Raises:
        KaspadMissing: none there, or the one given can't be run.
    """
    for source, candidate in (("given", given), ("KASPAD", os.environ.get("KASPAD"))):
        if candidate:
            found = shutil.which(candidate)
            if found is None:
                raise KaspadMissing(f"{candidate} ({source}) is no program that can be run")
            return Path(found).resolve()
    cached = cache_folder() / f"kaspad-{VERSION}" / "bin" / "kaspad"
    found = shutil.which("kaspad") or shutil.which(cached)
    if found is None:
        raise KaspadMissing(
            f"no kaspad found on PATH, in $KASPAD, or at {cached}. Get it with scripts/build-kaspad (about 15 "
            f"minutes), or: cargo install kaspad --version {VERSION} --locked"
        )
    return Path(found).resolve()


def version_of(kaspad: Path) -> str:
    """The version that a kaspad tells of itself, for instance ``2.1.0``.

    Raises:
        KaspadMissing: it does not run.
    """
    try:
        # kaspad says its version and then exits with 1.
        told = subprocess.run([kaspad, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KaspadMissing(f"{kaspad} does not run: {error}") from error
    name, _, version = told.strip().partition(" ")
    if name != "kaspad" or not version:
        raise KaspadMissing(f"{kaspad} is no kaspad: {told.strip()[:80] or 'it says nothing'}")
    return version


def free_port(inside: Namespace | None = None, host: str = LOOPBACK) -> int:
    """A TCP port that is free now."""
    with inside.socket() if inside is not None else socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class SimnetNode:
    """A kaspad on simnet. Made and ended by `simnet_node`; may be stopped, killed and started again in between.

    Args:
        kaspad: the binary.
        folder: where it keeps its chain (``--appdir``) and its log.
        inside: network namespace to run in; its P2P port then listens on the namespace's address.
        mining: accept blocks by RPC although not synced.
        utxo_index: keep the index that ``GetUtxosByAddresses`` needs.
        unsafe_rpc: let RPC change things (AddPeer, Ban). No bridge needs it.
        flags: further flags.

    Attributes:
        host, p2p_port, rpc_port: where it listens; the same over restarts. RPC is on 127.0.0.1 always.
        process: the running or last process.
    """

    def __init__(
        self,
        kaspad: Path,
        folder: Path,
        *,
        inside: Namespace | None = None,
        mining: bool = False,
        utxo_index: bool = False,
        unsafe_rpc: bool = False,
        flags: Sequence[str] = (),
    ) -> None:
        self.kaspad = kaspad
        self.folder = folder
        self.inside = inside
        self.host = LOOPBACK
        self.p2p_port = free_port(inside)
        self.rpc_port = free_port(inside)
        self._flags = [
            *(["--enable-unsynced-mining"] if mining else []),
            *(["--utxoindex"] if utxo_index else []),
            *(["--unsaferpc"] if unsafe_rpc else []),
            *flags,
        ]
        self.process: Process

    @property
    def argv(self) -> list[str]:
        """The command line."""
        listen = "0.0.0.0" if self.inside is not None else self.host  # noqa: S104 - a namespace of its own
        return [
            str(self.kaspad),
            "--simnet",
            f"--appdir={self.folder}",
            f"--listen={listen}:{self.p2p_port}",
            f"--rpclisten={LOOPBACK}:{self.rpc_port}",
            "--nologfiles",
            "--nodnsseed",
            "--disable-upnp",
            "--outpeers=0",
            "--yes",
            *self._flags,
        ]

    @property
    def p2p_address(self) -> str:
        """``ip:port`` at which another node reaches it."""
        host = self.inside.address if self.inside is not None else self.host
        return f"{host}:{self.p2p_port}"

    @property
    def log(self) -> Path:
        """What it wrote, over all its lives."""
        return self.folder / "kaspad.log"

    async def start(self) -> None:
        """Start it and wait until RPC answers.

        Raises:
            ProcessEnded: it ended instead; with its last lines.
            trio.TooSlowError: it did not answer in `READY_TIMEOUT` seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = Process.start(self.argv, log=self.log, inside=self.inside)
        with within(READY_TIMEOUT, "the start of kaspad"):
            while True:
                if not self.process.running:
                    raise ProcessEnded(f"kaspad ended while starting:\n{self.process.last_lines()}")
                with contextlib.suppress(OSError, KasError):
                    async with self.rpc() as rpc:
                        await rpc.get_info()
                        return
                await trio.sleep(0.02)

    async def stop(self) -> None:
        """End it in order. Nothing if it is not running."""
        await self.process.stop()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()

    async def connect_rpc_stream(self) -> trio.SocketStream:
        """A new connection to its RPC port, from inside its namespace."""
        raw = self.inside.socket() if self.inside is not None else None
        sock = trio.socket.from_stdlib_socket(raw) if raw is not None else trio.socket.socket()
        try:
            await sock.connect((LOOPBACK, self.rpc_port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    @asynccontextmanager
    async def rpc(self) -> AsyncIterator[KaspadRpc]:
        """Its RPC, for the length of a block."""
        async with open_rpc(await self.connect_rpc_stream()) as rpc:
            yield rpc

    async def __aenter__(self) -> Self:
        await self.start()
        return self


@asynccontextmanager
async def simnet_node(
    kaspad: Path | None = None,
    folder: Path | None = None,
    *,
    inside: Namespace | None = None,
    mining: bool = False,
    utxo_index: bool = False,
    unsafe_rpc: bool = False,
    flags: Sequence[str] = (),
) -> AsyncIterator[SimnetNode]:
    """Run a kaspad on simnet for the length of a block.

    Args:
        kaspad: the binary; found if ``None``.
        folder: its folder, kept afterwards; ``None``: a temporary one.
        inside, mining, utxo_index, unsafe_rpc, flags: see `SimnetNode`.

    Raises:
        KaspadMissing: there is none.
        ProcessEnded: it did not start.
    """
    binary = kaspad or find_kaspad()
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kas-simnet-")))
        node = SimnetNode(
            binary,
            folder,
            inside=inside,
            mining=mining,
            utxo_index=utxo_index,
            unsafe_rpc=unsafe_rpc,
            flags=flags,
        )
        try:
            await node.start()
            yield node
        finally:
            if hasattr(node, "process"):
                with trio.CancelScope(shield=True):
                    await node.stop()
