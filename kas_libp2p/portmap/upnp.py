"""UPnP IGD, by miniupnpc. Every call blocks, for seconds if need be, and belongs into a thread. One waits for another:
a caller that was cancelled leaves its call behind, and miniupnpc has no lock of its own.

Anybody in the local network can say that he is the router, so only who answers from the default gateway is believed.
"""

from __future__ import annotations

import threading
from typing import Any
from urllib.parse import urlsplit

SEARCH = 2000
"""Milliseconds for routers to answer the search; they may take up to the two seconds that it names."""
DESCRIPTION = "kas-libp2p"
PORTS_TRIED = 4
"""Outside ports that are tried if somebody has ours."""

_TAKEN = ("ConflictInMappingEntry", "ConflictWithOtherMechanisms")
_ONLY_PERMANENT = "OnlyPermanentLeasesSupported"


class UpnpError(Exception):
    """The router gave no mapping; the text is the end of a sentence about it, empty if it knows nothing of UPnP."""


class Igd:
    """The default gateway as an internet gateway device.

    Args:
        gateway: its IPv4 address.
        local: ours towards it.

    Raises:
        UpnpError: it is none.
    """

    def __init__(self, gateway: str, local: str) -> None:
        import miniupnpc  # here, as most nodes never need it

        self._lock = threading.Lock()
        self._local = local
        self._upnp: Any = miniupnpc.UPnP(multicastif=local, discoverdelay=SEARCH)
        try:
            self._upnp.discover()
            url = str(self._upnp.selectigd())
        except Exception as error:
            raise UpnpError from error
        host = urlsplit(url).hostname
        if host != gateway:
            raise UpnpError(f"does not answer UPnP, but {host} does, which is not believed")

    def address(self) -> str:
        """The outside address.

        Raises:
            UpnpError: it does not tell.
        """
        try:
            with self._lock:
                return str(self._upnp.externalipaddress())
        except Exception as error:
            raise UpnpError(f"does not tell its outside address ({error})") from error

    def map(self, port: int, external: int, others: list[int], lifetime: int) -> tuple[int, int]:
        """Map a TCP port, or keep it mapped.

        Args:
            external: the outside port that is wanted.
            others: those that will do as well, if that one is taken.

        Returns:
            outside port and lifetime; the lifetime is 0 if the router knows none.

        Raises:
            UpnpError: it did not.
        """
        for each in (external, *others[: PORTS_TRIED - 1]):
            for seconds in (lifetime, 0):
                try:
                    with self._lock:
                        self._upnp.addportmapping(each, "TCP", self._local, port, DESCRIPTION, "", seconds)
                except Exception as error:
                    reason = str(error)
                    if reason == _ONLY_PERMANENT:
                        continue
                    if reason in _TAKEN:
                        break
                    raise UpnpError(f"refuses the port over UPnP ({reason})") from error
                return each, seconds
        raise UpnpError("has given the port to somebody else (UPnP)")

    def holds(self, port: int, external: int) -> bool:
        """Whether the mapping is there."""
        try:
            with self._lock:
                entry = self._upnp.getspecificportmapping(external, "TCP")
        except Exception:  # noqa: BLE001 - miniupnpc raises nothing narrower
            return False
        return entry is not None and tuple(entry[:2]) == (self._local, port)

    def unmap(self, external: int) -> None:
        """Remove a mapping, if it is there."""
        try:
            with self._lock:
                self._upnp.deleteportmapping(external, "TCP")
        except Exception:  # noqa: BLE001 - miniupnpc raises nothing narrower
            return
