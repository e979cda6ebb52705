"""What goes on in a node: its events as they happen, and its status at the end (Ctrl-C).

python examples/watch.py [MULTIADDR ...]     listens, and connects to these
"""

import contextlib
import sys

import trio

from kas_libp2p import Config, DialError, Node, open_node
from kas_libp2p.events import ConnectionClosed, ConnectionOpened, Event, PeerIdentified


def tell(event: Event) -> None:
    match event:
        case ConnectionOpened(peer=peer, path=path, direction=direction, address=address):
            print(f"{peer} {path}, {direction}, at {address}", flush=True)
        case PeerIdentified(peer=peer, agent=agent, observed=observed):
            print(f"{peer} is {agent} and sees us at {observed}", flush=True)
        case ConnectionClosed(peer=peer, reason=reason, received=received, sent=sent):
            print(f"{peer} left: {reason} ({received} bytes in, {sent} out)", flush=True)


def show_status(node: Node) -> None:
    status = node.status()
    print(f"{len(status.connections)} of {status.limits.max_connections} connections; counted: {dict(status.events)}")
    for each in status.connections:
        rtt = "?" if each.rtt is None else f"{each.rtt * 1000:.1f} ms"
        print(f"  {each.peer} {each.path} {rtt}, up {each.seconds:.1f} s, serves {len(each.protocols)} protocols")


async def main(targets: list[str]) -> None:
    async with open_node(Config(listen=("/ip4/127.0.0.1/tcp/0",))) as node:
        print("listening at", *node.addresses, flush=True)
        events = node.events()  # from now on; a reader that is too slow loses the oldest, and is told how many
        for target in targets:
            try:
                print(f"{target} answers in {await node.ping(target) * 1000:.1f} ms", flush=True)
            except DialError as error:
                print(error, flush=True)
        try:
            async for event in events:
                tell(event)
        finally:
            show_status(node)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        # Else Ctrl-C interrupts whatever runs just then, such as the task of a connection, which ends by that.
        trio.run(main, sys.argv[1:], restrict_keyboard_interrupt_to_checkpoints=True)
