"""A light Kaspa peer on the overlay: it shakes hands like a node, answers what nodes ask, and follows no chain.

python examples/light_peer.py NETWORK               waits for Kaspa peers
python examples/light_peer.py NETWORK MULTIADDR     meets one, and measures the round trip from node to node
"""

import sys

import trio

from kas_libp2p import Config, KasError, open_node
from kas_libp2p.events import ConnectionOpened
from kas_libp2p.kaspa.peer import LightPeer


async def wait_for_peers(network: str) -> None:
    async with open_node(Config(listen=("/ip4/0.0.0.0/tcp/0",))) as node, LightPeer(network) as kaspa:
        events = node.events()
        await node.serve(kaspa.handle)  # Kaspa streams, whatever the way and the dialect
        print("listening at", *node.addresses, flush=True)
        async for event in events:
            if isinstance(event, ConnectionOpened):
                print(event.peer, "came", event.path, flush=True)


async def meet(network: str, address: str) -> None:
    async with open_node(Config(listen=())) as node, LightPeer(network) as kaspa:
        try:
            stream = await node.connect(address)  # no protocol named: a Kaspa stream
            peer = await kaspa.handshake(stream)
        except KasError as error:
            sys.exit(f"no handshake: {error}")
        print("met", peer.info.user_agent, "on", peer.info.network, "in", stream.metadata.dialect)
        print(f"round trip {await peer.ping() * 1000:.1f} ms")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        trio.run(meet, *sys.argv[1:3])
    else:
        trio.run(wait_for_peers, sys.argv[1] if len(sys.argv) > 1 else "kaspa-mainnet")
