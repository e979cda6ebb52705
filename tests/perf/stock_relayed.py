"""py-libp2p as it comes, at both ends of a circuit: a yardstick of `tests.perf.relay`.

usage: python -m tests.perf.stock_relayed listen RELAY
       python -m tests.perf.stock_relayed dial RELAY

Its relay ends circuits that it should keep, and its client can't dial them. So the relay is another's, and the messages
that make a circuit are written here by hand. All that passes then goes through its own code alone: TCP, Noise and Yamux
to the relay, and on a stream of that Noise and Yamux once more. Orders: ``connect``, ``perf``, ``echo`` (dial).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import trio

from kas_libp2p import addresses
from kas_libp2p.framing import FrameDecoder
from kas_libp2p.relay._messages import (
    HOP,
    MAX_MESSAGE,
    STOP,
    Connect,
    HopMessage,
    HopStatus,
    Reserve,
    Status,
    StopStatus,
    decode_hop,
    encode_hop,
    encode_stop,
)
from tests.perf.peers import Stock, act, read_orders, say, stock_peer


async def receive(stream: Any) -> bytes:
    """A message behind its length, and not a byte more."""
    decoder = FrameDecoder(MAX_MESSAGE)
    while (message := decoder.next_frame()) is None:
        decoder.feed(await stream.read(1))
    return message


class Relayed(Stock):
    """Calls others, and is called, through a relay."""

    def __init__(self, host: Any, relay: str) -> None:
        super().__init__(host)
        self._relay = relay

    def _raw(self, stream: Any, initiator: bool) -> Any:
        from libp2p.abc import ConnectionType
        from libp2p.network.connection.raw_connection import RawConnection
        from multiaddr import Multiaddr

        return RawConnection(stream, initiator, ConnectionType.RELAYED, [Multiaddr(f"{self._relay}/p2p-circuit")])

    async def _ask(self, message: HopMessage) -> Any:
        await super().connect(self._relay)
        stream = await self._host.new_stream(self._peer, [HOP])
        await stream.write(encode_hop(message))
        answer = decode_hop(await receive(stream))
        if not isinstance(answer, HopStatus) or answer.status is not Status.OK:
            raise ConnectionError(f"the relay says {answer}")
        return stream

    async def listen(self) -> str:
        from multiaddr import Multiaddr

        await super().listen()

        async def called(stream: Any) -> None:
            await receive(stream)
            await stream.write(encode_stop(StopStatus(Status.OK)))
            await self._host.upgrade_inbound_connection(self._raw(stream, False), Multiaddr(self._relay))

        self._host.set_stream_handler(STOP, called)
        await self._ask(Reserve())
        return str(self._host.get_id())

    async def connect(self, address: str) -> None:
        from libp2p.peer.id import ID

        peer = addresses.peer_of(address)
        assert peer is not None
        stream = await self._ask(Connect(peer))
        self._peer = ID.from_string(peer)
        await self._host.upgrade_outbound_connection(self._raw(stream, True), self._peer)


async def run(relay: str, listen: bool) -> None:
    async with stock_peer(listen, many=False) as stock:
        assert isinstance(stock, Stock)
        peer = Relayed(stock._host, relay)
        say("started", peer="")
        if listen:
            say("reserved", peers=[await peer.listen()])

        await read_orders(partial(act, peer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("listen", "dial"))
    parser.add_argument("relay")
    options = parser.parse_args()
    trio.run(run, options.relay, options.role == "listen")


if __name__ == "__main__":
    main()
