"""Circuits between all implementations through all relays: ours, go-libp2p's, js-libp2p's and rust-libp2p's."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio

from kas_libp2p.errors import KasError
from tests.interop import ends
from tests.interop.ends import End, Programs
from tests.interop.peer import PeerError, leaves

KINDS = ("ours", "go", "js", "rust")
SIZE = 3 << 20
"""Bytes: more than windows of 256 KiB let out at once, so that updates have to come."""
LITTLE = 512 << 10
"""Bytes, and still more than one window: js misses the end of a stream that comes before it reads, go's too."""
PATIENCE = 100.0
"""Seconds for all cells of one relay, four at a time: some 3 on an idle machine, 60 on one with ten times the load."""
WORKS = {"circuit", "echo", "echo back", "tells its address", "is told of the caller"}
NO_ADDRESS = "Failed to get Reservation.: Protocol error: Expected at least one address in reservation."
EXCEPTIONS: dict[tuple[str, str, str], set[str]] = {
    # go's relay tells public addresses only, and rust wants one. Ours and js name the address that they dialed.
    ("go", "", "rust"): {NO_ADDRESS},
    # go announces an address through a relay only if it chose the relay by itself.
    ("", "", "go"): WORKS - {"tells its address"},
    # rust sees its caller at /p2p/CALLER, of which js's identify makes an error.
    ("", "js", "rust"): WORKS - {"tells its address"},
}
"""What is expected where not all of it works, by relay, caller and called; empty: all of them."""


def expected(*cell: str) -> set[str]:
    for exception, worked in EXCEPTIONS.items():
        if all(one in ("", other) for one, other in zip(exception, cell, strict=True)):
            return worked
    return WORKS


async def call(caller: End, called: End, relay: str, size: int) -> set[str]:
    """Make a circuit and use it in every way. Returns what worked."""
    worked = set()
    await caller.connect(f"{relay}/p2p-circuit/p2p/{called.peer}")
    if all("/p2p-circuit" in way for way in caller.ways(called.peer) + called.ways(caller.peer)):
        worked.add("circuit")
    await caller.echo(called.peer, size)
    worked.add("echo")
    await called.echo(caller.peer, LITTLE)
    worked.add("echo back")
    await called.told(caller.peer)
    worked.add("is told of the caller")
    try:
        told = await caller.told(called.peer)
    except PeerError:
        return worked
    if any(each.startswith(f"{relay}/p2p-circuit") for each in told["addresses"]):
        worked.add("tells its address")
    return worked


@pytest.mark.parametrize("relay", KINDS)
async def test_everybody_calls_everybody(relay: str, programs: Programs) -> None:
    seen: dict[tuple[str, str], set[str]] = {}
    async with AsyncExitStack() as stack:
        address, _ = await stack.enter_async_context(ends.relay(relay, programs))
        called: dict[str, End] = {}
        for kind in KINDS:
            try:
                called[kind] = await stack.enter_async_context(ends.called(kind, programs, address))
            except* PeerError as problem:
                seen |= {(caller, kind): {*map(str, leaves(problem))} for caller in KINDS}

        async def calls(kind: str) -> None:
            async with ends.caller(kind, programs, address) as caller:
                for other, end in called.items():
                    size = SIZE if "ours" in (relay, kind, other) else LITTLE
                    try:
                        seen[kind, other] = await call(caller, end, address, size)
                    except* (KasError, PeerError) as problem:
                        seen[kind, other] = {*map(str, leaves(problem))}

        with trio.move_on_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for kind in KINDS:
                    nursery.start_soon(calls, kind)
    missing = {f"not done within {PATIENCE:g} s"}
    cells = {(relay, caller, each): seen.get((caller, each), missing) for caller in KINDS for each in KINDS}
    wrong = {cell: worked for cell, worked in cells.items() if worked != expected(*cell)}
    assert not wrong, wrong
