"""The prober's server in a lab, and what it finds of the lab's own NAT types."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ._stun import DEFAULT_PORT, Endpoint
from .nat import TYPES
from .probe import Findings, probe
from .running import RunningLab
from .topology import Lab, home, public

NAME = "reflector"


def add_reflector(lab: RunningLab) -> Endpoint:
    """Add a public host with two addresses and the prober's server in it; returns the server's first endpoint.

    A lab has one at most: asked again, it is the same one.
    """
    if NAME not in (host.name for host in lab.hosts):
        (host,) = lab.add(public(NAME, addresses=2))
        prefix, _, last = host.address.rpartition(".")
        addresses = [host.address, f"{prefix}.{int(last) + 1}"]
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        server = host.spawn([sys.executable, "-m", "natlab", "probe", "--serve", *addresses], env={"PYTHONPATH": paths})
        server.expect("^serving")
    return lab[NAME].address, DEFAULT_PORT


def probe_types(names: Sequence[str] = TYPES) -> dict[str, Findings]:
    """What the prober finds of a home of each type, all in one lab and at once.

    Who is not as promised is probed again alone: for so many at once a machine may be too busy, and silence is measured
    by the clock.
    """
    sites = [home(f"h{index}", name) for index, name in enumerate(names)]
    with RunningLab(Lab(tuple(sites))) as lab, ThreadPoolExecutor(len(names)) as pool:
        server = add_reflector(lab)
        makers = [lab[site.name].socket for site in sites]
        found = list(pool.map(lambda make: probe(server, make), makers))
        for index, name in enumerate(names):
            if found[index].differences(name):
                found[index] = probe(server, makers[index])
    return dict(zip(names, found, strict=True))
