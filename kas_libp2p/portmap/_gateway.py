"""The default gateways, from the texts of ``/proc/net/route`` and ``/proc/net/ipv6_route``. No I/O.

Sources: proc_net(5); of IPv6, Linux' ``Documentation/networking`` and ``net/ipv6/route.c``.
"""

from __future__ import annotations

import ipaddress
import struct

_UP, _GATEWAY = 0x1, 0x2


def default_gateway(table: str) -> str | None:
    """The IPv4 address of the default gateway with the least metric; ``None`` if there is none."""
    found: list[tuple[int, str]] = []
    for line in table.splitlines()[1:]:
        try:
            _, destination, gateway, flags, _, _, metric, mask, *_ = line.split()
            if int(destination, 16) == int(mask, 16) == 0 and int(flags, 16) & (_UP | _GATEWAY) == _UP | _GATEWAY:
                ip = ipaddress.IPv4Address(struct.pack("=I", int(gateway, 16)))  # in the byte order of the machine
                found.append((int(metric), str(ip)))
        except (ValueError, struct.error):
            continue
    return min(found)[1] if found else None


def default_gateway6(table: str) -> tuple[str, str] | None:
    """The IPv6 address of the default gateway with the least metric, and the interface; ``None`` if there is none."""
    found: list[tuple[int, str, str]] = []
    for line in table.splitlines():
        try:
            destination, length, _, _, gateway, metric, _, _, flags, interface = line.split()
            if int(destination, 16) == int(length, 16) == 0 and int(flags, 16) & (_UP | _GATEWAY) == _UP | _GATEWAY:
                found.append((int(metric, 16), str(ipaddress.IPv6Address(int(gateway, 16))), interface))
        except ValueError:
            continue
    return min(found)[1:] if found else None
