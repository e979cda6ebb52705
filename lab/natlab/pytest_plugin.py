"""The pytest plugin. Synchronous fixtures, so they serve trio, asyncio and plain tests alike.

Fixtures:
    lab: a running lab of its own for each test, empty, or as ``@pytest.mark.natlab(...)`` says.
    nat_type: every NAT type in turn, or those of ``@pytest.mark.nat_types(...)``.
    nat_pair: two homes and a public host between them, for every pair of ``@pytest.mark.nat_types(...)``.

When a test fails, or is not even set up, what its programs wrote and a capture of the core are kept, and the report
shows the network and names the files. Where the system can't hold a lab the test is skipped with the reason, or fails
if ``--natlab-required`` is given.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import pytest

from .errors import TopologyError, Unsupported
from .nat import TYPES, chain_of
from .picture import picture
from .running import Host, RunningLab
from .topology import Lab, lab_from_text

PAIR_TYPES = ("fc", "pr", "sym")
"""What `nat_pair` pairs unless told otherwise: one of each group that behaves differently."""
PAIR_DELAY = 0.0125
"""Seconds each way on the lines of a `nat_pair`: 25 ms between the two, below 20 some NATs look worse than they are."""


@dataclass(frozen=True, slots=True)
class NatPair:
    """Two homes and what they can meet at.

    Attributes:
        lab: where they are.
        types: of alice's and of bob's NAT.
        alice, bob: one host behind each.
        relay: a host with public addresses.
    """

    lab: RunningLab
    types: tuple[str, str]
    alice: Host
    bob: Host
    relay: Host


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("natlab", "networks with real NATs")
    group.addoption("--natlab-required", action="store_true", help="fail instead of skip where no lab can be made")
    parser.addini("natlab_capture", "record the packets of each test's lab", type="bool", default=True)
    parser.addini("natlab_preload", "modules to import once for functions in hosts", type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    from . import preload

    config.addinivalue_line(
        "markers", "natlab(*sites, wan=..., seed=...): what the fixture `lab` starts with: sites as text, or one Lab"
    )
    config.addinivalue_line("markers", "nat_types(*types): the NAT types for `nat_type` and `nat_pair`")
    preload(*config.getini("natlab_preload"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("nat_types")
    for name in marker.args if marker else ():
        chain_of(name)  # an unknown type is an error of the test file, which says what there is
    if "nat_type" in metafunc.fixturenames:
        metafunc.parametrize("nat_type", marker.args if marker else TYPES)
    if "nat_pair" in metafunc.fixturenames:
        types = marker.args if marker else PAIR_TYPES
        pairs = list(combinations_with_replacement(types, 2))
        metafunc.parametrize("nat_pair", pairs, indirect=True, ids=["+".join(pair) for pair in pairs])


def _topology(request: pytest.FixtureRequest) -> Lab:
    marker = request.node.get_closest_marker("natlab")
    if marker is None:
        return Lab()
    if len(marker.args) == 1 and isinstance(marker.args[0], Lab) and not marker.kwargs:
        return marker.args[0]
    if unknown := sorted(set(marker.kwargs) - {"wan", "seed"}):
        raise TopologyError(f"the marker natlab has no {unknown[0]!r}: it takes sites, wan and seed")
    options = [f"{key}={value}" for key, value in marker.kwargs.items()]
    if not all(isinstance(each, str) for each in marker.args):
        raise TopologyError("the marker natlab takes one Lab, which says all, or sites as text")
    return lab_from_text([*marker.args, *options])


_KEPT = pytest.StashKey[tuple[RunningLab, pytest.TempPathFactory]]()


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningLab]:
    """A lab of the test's own; see the marker ``natlab``."""
    try:
        running = RunningLab(_topology(request))
    except Unsupported as error:
        if request.config.getoption("--natlab-required"):
            raise
        pytest.skip(str(error))
    with running:
        if request.config.getini("natlab_capture"):
            running.capture()
        request.node.stash[_KEPT] = running, tmp_path_factory
        yield running
        del request.node.stash[_KEPT]


@pytest.fixture
def nat_pair(request: pytest.FixtureRequest, lab: RunningLab) -> NatPair:
    """Two homes whose NAT types are the next pair of the marker ``nat_types``."""
    types: tuple[str, str] = request.param
    alice, bob = (lab.home(name, kind, delay=PAIR_DELAY) for name, kind in zip(("alice", "bob"), types, strict=True))
    return NatPair(lab, types, alice, bob, lab.public("relay"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and _KEPT in item.stash:
        running, directories = item.stash[_KEPT]
        files = running.save(directories.mktemp(re.sub(r"\W+", "-", item.name)[:40]))
        report.sections.append(("natlab", "\n".join([*picture(running.topology), *map(str, files)])))
    return report
