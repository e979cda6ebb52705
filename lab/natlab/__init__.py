"""natlab: real NATs on one machine.

::

    with natlab.RunningLab() as lab:
        relay = lab.public("relay")
        alice = lab.home("alice", nat="pr", delay="25ms")
        alice.run(["curl", f"http://{relay.address}:8080/"])

`Lab` and what it is made of are values; `RunningLab` is one of them in the kernel. `probe` measures what a NAT does,
`matrix` what can be punched. Also a command (``natlab``) and a pytest plugin (`natlab.pytest_plugin`).
"""

from ._zygote import preload
from .errors import CommandFailed, LabError, RemoteError, TopologyError, Unsupported
from .nat import NATS, TYPES, Filtering, Mapping, Nat, Promise, promise_of
from .processes import Call, Completed, Process
from .running import Between, Host, Line, Router, RunningLab
from .topology import Lab, Link, Site, home, lab_from_text, public

__all__ = [
    "NATS",
    "TYPES",
    "Between",
    "Call",
    "CommandFailed",
    "Completed",
    "Filtering",
    "Host",
    "Lab",
    "LabError",
    "Line",
    "Link",
    "Mapping",
    "Nat",
    "Process",
    "Promise",
    "RemoteError",
    "Router",
    "RunningLab",
    "Site",
    "TopologyError",
    "Unsupported",
    "home",
    "lab_from_text",
    "preload",
    "promise_of",
    "public",
]
