"""A topology as a small drawing for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from . import plan
from .topology import Lab, Site


def picture(lab: Lab) -> Iterator[str]:
    """Line by line::

    core
    ├── 25 ms ── alice/router 11.1.0.2 (pr) ── alice 192.168.1.10
    └── relay 11.2.0.2 2d00:0:2::2
    """
    yield "core"
    for number, site in enumerate(lab.sites, 1):
        last = number == len(lab.sites)
        link = lab.link_of(site)
        chain = ([] if link.is_plain else [str(link)]) + _routers(site, number)
        hosts = [_host(lab, name) for name in site.hosts]
        start = ("└── " if last else "├── ") + " ── ".join(chain)
        if len(hosts) == 1:
            yield (start + " ── " if chain else start) + hosts[0]
            continue
        yield start
        for host in hosts:
            yield ("    " if last else "│   ") + ("└── " if host is hosts[-1] else "├── ") + host


def _routers(site: Site, number: int) -> list[str]:
    described = []
    for depth, router in enumerate(site.routers):
        extras = [router.nat, *(["hairpin"] if router.hairpin else []), *router.services]
        if site.ipv6 == "fw" and depth == len(site.routers) - 1:
            extras.append("IPv6 firewall")
        described.append(f"{site.router_name(depth)} {plan.router_address(number, depth)} ({', '.join(extras)})")
    return described


def _host(lab: Lab, name: str) -> str:
    addresses = (plan.host_address(lab, name), plan.host_address(lab, name, 6))
    return " ".join([name, *filter(None, addresses)])
