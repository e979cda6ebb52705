"""What the documentation shows, works: the programs in examples/, README's snippet, the bytes of the wire format."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from kas_libp2p import Config, KasError, Node, OverlayStream, open_node
from kas_libp2p.config import Purpose, RelayConfig, Role
from kas_libp2p.events import ReservationMade
from kas_libp2p.identity import Identity
from kas_libp2p.kaspa._messages import Capability, CloseCode, Kind, Reader, decode, encode
from kas_libp2p.kaspa.messages import _unpacker
from tests.command import COMMAND, PATIENCE, Running

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def example(name: str, *arguments: str) -> Running:
    return Running([sys.executable, str(EXAMPLES / name), *arguments])


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def finished(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(str(EXAMPLES / name), *arguments)


in_thread = trio.to_thread.run_sync


def address_in(line: str) -> str:
    """The loopback address that a program says it listens at."""
    return next(word for word in line.split() if word.startswith("/ip4/127."))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_every_example_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 60


def test_echo() -> None:
    with example("echo.py") as server:
        client = finished("echo.py", address_in(server.wait_for_line("/ip4/127.")))
        assert client.returncode == 0, client.stderr
        assert "said hello by a path that is direct" in client.stdout


def test_light_peer() -> None:
    with example("light_peer.py", "kaspa-simnet") as server:
        address = address_in(server.wait_for_line("listening at"))
        met = finished("light_peer.py", "kaspa-simnet", address)
        assert met.returncode == 0, met.stderr
        assert re.search(
            r"met /kas-libp2p:[\d.]+/ on kaspa-simnet in /kas-libp2p/messages/1.0.0\nround trip", met.stdout
        )
        server.wait_for_line("came direct")


def node(identity: Identity | None = None, *listen: str) -> AbstractAsyncContextManager[Node]:
    """A node in this process: who is not under test need not be started."""
    return open_node(Config(listen=listen), identity=identity)


async def test_watch() -> None:
    async with node(None, "/ip4/127.0.0.1/tcp/0") as other:
        with example("watch.py", other.addresses[0], "/ip4/127.0.0.1/tcp/1") as watch:
            for part in ("answers in", "Connection refused", f"{other.peer_id} is kas-libp2p/"):
                await in_thread(watch.wait_for_line, part)
            watch.process.send_signal(signal.SIGINT)
            assert await in_thread(watch.process.wait, PATIENCE) == 0, watch.text
            assert "1 of 256 connections" in watch.text
            assert f"  {other.peer_id} direct" in watch.text


async def test_direct() -> None:
    """On loopback nothing is punched; ``tests/lab/test_tool.py`` has it where something is."""
    serving = RelayConfig(serve=True, purpose=Purpose.ANY)
    public = Config(listen=("/ip4/127.0.0.1/tcp/0",), role=Role.PUBLIC, relay=serving)
    async with open_node(public) as relay, node(None, "/ip4/127.0.0.1/tcp/0") as other:
        events = other.events()
        other.use_relays(*relay.addresses)
        async for event in events:
            if isinstance(event, ReservationMade):
                break
        done = await in_thread(finished, "direct.py", event.addresses[0])
        assert done.returncode == 0, done.stderr
        assert re.match(r"\d+ ms through the relay\nit stays relayed: .+\n12D3KooW\S+ is relayed by 12D3", done.stdout)


async def test_gate() -> None:
    friend_key = Identity.generate()
    with example("gate.py", friend_key.peer_id) as gate:
        address = address_in(await in_thread(gate.wait_for_line, "listening at"))
        async with node() as stranger, node() as another, node(friend_key) as friend:
            await stranger.ping(address)
            await in_thread(gate.wait_for_line, f"let in {stranger.peer_id}")
            with pytest.raises(KasError):
                await another.ping(address)
            await in_thread(gate.wait_for_line, "by policy")
            await friend.ping(address)
            await in_thread(gate.wait_for_line, f"let in {friend.peer_id}")


async def echo(stream: OverlayStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def test_the_snippet_in_readme(tmp_path: Path) -> None:
    """As it stands, with an address of somebody who echoes in the place of the dots."""
    section = (ROOT / "README.md").read_text().partition("## In Python")[2]
    (snippet,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    async with node(None, "/ip4/127.0.0.1/tcp/0") as other:
        await other.serve(echo, "/echo/1.0.0")
        program, places = re.subn(r'"/ip4/…[^"]*"', f'"{other.addresses[0]}"', snippet)
        assert places == 1
        (tmp_path / "snippet.py").write_text(program)
        done = await in_thread(run, str(tmp_path / "snippet.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "direct b'hello'\n"


def test_the_bytes_in_messages_protocol() -> None:
    """A stranger's implementation that is made from the page reads and writes what ours does."""
    rows = re.findall(r"^\| ((?:`[0-9a-f ]+` ?)+)\| (\w+)", (ROOT / "docs" / "messages-protocol.md").read_text(), re.M)
    wire = {name: bytes.fromhex(code.replace("`", "")) for code, name in rows}
    reader = Reader(unpack=_unpacker())
    messages: list[bytes] = []
    for name in ("HELLO", "MESSAGE", "BEGIN", "PACKED", "ALIVE", "PROBE", "CLOSE"):
        reader.feed(wire[name])
        while not reader.wants_data:
            messages += (bytes(piece.data) for piece in reader.take(1 << 20))
    assert b"".join(messages) == b"\x9a\x01\x00" + b"kaspa!" + b"a" * 80
    hello, alive, probe, close = reader.controls
    for control, name in ((hello, "HELLO"), (alive, "ALIVE"), (probe, "PROBE"), (close, "CLOSE")):
        assert encode(control) == wire[name]
        assert decode(Kind[name], wire[name][4:]) == control


def test_the_numbers_in_messages_protocol() -> None:
    """Every kind and every code has its row, with its number."""
    text = (ROOT / "docs" / "messages-protocol.md").read_text()
    for each in (*Kind, *CloseCode):
        assert re.search(rf"^\| {each.value} \| {each.name} \|", text, re.M), each
    assert f"bits: {Capability.ZSTD.value} is ZSTD" in text


def test_the_commands_in_kas_libp2p() -> None:
    """The script at the end of docs/kas-libp2p.md names options that there are."""
    helps = subprocess.run([*COMMAND, "listen", "--help"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    text = (ROOT / "docs" / "kas-libp2p.md").read_text()
    for option in re.findall(r"--[a-z]+", helps.stdout):
        assert option in text, option


def test_the_tests_in_py_libp2p() -> None:
    """Every test that docs/py-libp2p.md names is there."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "py-libp2p.md").read_text()))
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text())
    }
    assert len(named) > 20
    assert not named - there
