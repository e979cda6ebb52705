"""What a peer can make a whole node send by DCUtR, counted as packets."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import trio

from kas_libp2p import Config, open_node
from kas_libp2p.config import PunchConfig, Purpose, RelayConfig, Role
from kas_libp2p.dcutr._candidates import HOST_BURST
from kas_libp2p.dcutr._messages import MAX_MESSAGE, PROTOCOL, Connect, Sync, encode
from kas_libp2p.errors import KasError
from kas_libp2p.events import ReservationMade
from kas_libp2p.metadata import PathKind
from kas_libp2p.ping import ID as PING
from kas_libp2p.swarm import SwarmConnection
from kas_libp2p.transport._punch import UNTRUSTED_DIALS
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream
from natlab import RunningLab

pytestmark = pytest.mark.lab

LISTEN = ("/ip4/0.0.0.0/tcp/16117",)
ROUNDS = 5
ETH_P_IP, ETH_P_ALL = 0x0800, 0x0003
NEVER = [
    f"/ip4/{ip}/tcp/4001"
    for ip in (
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
    )
]


async def relay() -> None:
    config = Config(listen=LISTEN, role=Role.PUBLIC, relay=RelayConfig(serve=True, purpose=Purpose.ANY))
    async with open_node(config) as node:
        print(*node.addresses, sep="\n", flush=True)
        await trio.sleep_forever()


@contextlib.contextmanager
def syns() -> Iterator[Counter[str]]:
    """Counts the SYNs that have left by when the block ends, by ``ip:port``."""
    sent: Counter[str] = Counter()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as tap:
        tap.setblocking(False)
        yield sent
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, (_, protocol, kind, *_) = tap.recvfrom(100)
                leaves = (protocol, kind, packet[9]) == (ETH_P_IP, socket.PACKET_OUTGOING, socket.IPPROTO_TCP)
                if leaves and packet[33] & 0x12 == 0x02:
                    port = int.from_bytes(packet[22:24], "big")
                    sent[f"{socket.inet_ntoa(packet[16:20])}:{port}"] += 1


async def attacked(at: str, mallory: str) -> dict[str, int]:
    """A node at home, which calls mallory, and is called. Returns the SYNs that it sent until a line comes, to whom."""

    async def tell() -> None:
        async for event in node.events():
            print(event, flush=True)  # what a failure shows
            if isinstance(event, ReservationMade):
                print("place", event.addresses[0], flush=True)

    config = Config(listen=LISTEN, relay=RelayConfig(relays=(at,), target=1))
    with syns() as sent:
        async with open_node(config) as node, trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            await node.connect(mallory, PING)
            await trio.to_thread.run_sync(sys.stdin.readline)
            nursery.cancel_scope.cancel()
    return dict(sent)


async def mallory(at: str, victims: list[str]) -> None:
    """Names the victims, by CONNECT and by identify, to whoever calls it, and to whom it calls."""
    told = Connect(tuple(victims))

    async def invite(connection: SwarmConnection) -> None:
        for _ in range(ROUNDS):
            with contextlib.suppress(KasError):
                stream = await connection.connection.open_stream(PROTOCOL)
                await stream.send_all(encode(told))
                await receive_frame(stream, MAX_MESSAGE)
                await stream.send_all(encode(Sync()))
                await stream.receive_some()
                stream.reset()
        print("invited", flush=True)

    async def answer(stream: YamuxStream) -> None:
        await receive_frame(stream, MAX_MESSAGE)
        await stream.send_all(encode(told))
        await receive_frame(stream, MAX_MESSAGE)

    config = Config(
        announce=tuple(victims), relay=RelayConfig(relays=(at,), target=1), punch=PunchConfig(enabled=False)
    )
    async with open_node(config) as node, trio.open_nursery() as nursery:

        def connected(connection: SwarmConnection) -> None:
            if connection.path.kind is PathKind.RELAYED and not connection.connection.initiator:
                nursery.start_soon(invite, connection)

        node.swarm.on_connected.append(connected)
        node.swarm.handle(PROTOCOL, answer)
        async for event in node.events():
            if isinstance(event, ReservationMade):
                print("place", event.addresses[0], flush=True)
                break
        alice = await trio.to_thread.run_sync(sys.stdin.readline)
        for _ in range(ROUNDS):
            with contextlib.suppress(KasError):
                await node.connect(alice.strip(), PING)
            await trio.sleep(3)
            await node.disconnect(alice.strip().rpartition("/")[2])
        print("called", flush=True)
        await trio.sleep_forever()


def test_what_a_peer_can_make_us_send(lab: RunningLab) -> None:
    server = lab.public("relay")
    at = server.spawn_python(relay).expect(r"^/ip4/\S+$")[0]
    silent, answers = lab.home("silent", "pr").public_address, lab.public("answers").address
    victims = [f"/ip4/{ip}/tcp/{port}" for ip in (silent, answers) for port in (25, 4001, 4002, 4003)] + NEVER
    at_home = lab.home("mallory", "sym")
    wicked = at_home.spawn_python(mallory, at, victims)
    alice = lab.home("alice", "pr").spawn_python(attacked, at, wicked.expect(r"^place (\S+)$")[1])
    assert wicked.stdin is not None
    wicked.stdin.write(alice.expect(r"^place (\S+)$")[1].encode() + b"\n")
    wicked.stdin.flush()
    wicked.expect("^invited$")
    wicked.expect("^called$")
    assert alice.stdin is not None
    alice.stdin.write(b"\n")
    alice.stdin.flush()
    sent = alice.result()
    assert isinstance(sent, dict)
    print(sent)
    del sent[f"{server.address}:16117"]
    (mallory_at,) = {to.partition(":")[0] for to in sent} - {silent, answers}
    by_host = {ip: sum(n for to, n in sent.items() if to.startswith(f"{ip}:")) for ip in (silent, answers)}
    assert not any(to.endswith(":25") for to in sent)
    assert mallory_at == at_home.public_address
    assert 1 <= by_host[silent] <= HOST_BURST
    assert 1 <= by_host[answers] <= HOST_BURST * UNTRUSTED_DIALS
