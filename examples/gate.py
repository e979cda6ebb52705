"""A gate of one's own: friends may always come in, strangers one at a time.

    python examples/gate.py [PEER_ID ...]     listens; these are the friends

Limits and lists need no code: see `Limits`, and ``allow`` and ``deny`` of `Config`.
"""

import sys

import trio

from kas_libp2p import Candidate, Config, Limits, open_node
from kas_libp2p.events import ConnectionOpened, InboundRefused

PAUSE = 10.0
"""Seconds between two strangers."""


class Gate:
    """Asked about every connection: before its handshake, when only the IP is known, and again when the peer is."""

    def __init__(self, friends: set[str]) -> None:
        self._friends = friends
        self._closed_until = 0.0

    def __call__(self, candidate: Candidate) -> str | None:
        """Returns why not, or None to let it pass. Must not block."""
        if candidate.peer is None or candidate.peer in self._friends:
            return None
        now = trio.current_time()
        if now < self._closed_until:
            return "another stranger came just now"
        self._closed_until = now + PAUSE
        return None


async def main(friends: set[str]) -> None:
    limits = Limits(max_inbound=32, max_per_ip=4)
    async with open_node(Config(listen=("/ip4/127.0.0.1/tcp/0",), limits=limits)) as node:
        node.set_policy(Gate(friends))
        events = node.events()
        print("listening at", *node.addresses, flush=True)
        async for event in events:
            match event:
                case ConnectionOpened(peer=peer):
                    print("let in", peer, flush=True)
                case InboundRefused(address=address, reason=reason):
                    print("turned away", address, "by", reason, flush=True)


if __name__ == "__main__":
    trio.run(main, set(sys.argv[1:]))
