"""The prober's server in a lab."""

from __future__ import annotations

import os
import sys

from ._stun import DEFAULT_PORT, Endpoint
from .running import RunningLab
from .topology import public

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
