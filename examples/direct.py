"""Whether a connection through a relay becomes direct: two nodes behind routers that nobody touched meet.

python examples/direct.py /ip4/.../p2p/RELAY/p2p-circuit/p2p/PEER
"""

import sys

import trio

from kas_libp2p import DialError, open_node
from kas_libp2p.events import PathProven, UpgradeAbandoned

PATIENCE = 30.0
"""Seconds to wait for a peer that does nothing at all."""


async def main(address: str) -> None:
    async with open_node() as node:  # it listens: who is nowhere can't be met
        events = node.events()
        try:
            rtt = await node.ping(address)
        except DialError as error:
            sys.exit(str(error))
        print(f"{rtt * 1000:.0f} ms through the relay", flush=True)
        with trio.move_on_after(PATIENCE):
            async for event in events:
                match event:
                    case PathProven(path=path, rtt=rtt):
                        print(f"{path.kind}, {rtt * 1000:.0f} ms: new streams take that way, old ones stay")
                        break
                    case UpgradeAbandoned(text=text):
                        print(f"it stays relayed: {text}")
                        break
        print(*node.why(address.rpartition("/")[2]), sep="\n")


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
