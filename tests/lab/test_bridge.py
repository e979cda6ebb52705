"""The command kas-bridge at home: its port on a real router, from the start to the end."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from natlab import Host, RunningLab

pytestmark = pytest.mark.lab

COMMAND = (sys.executable, "-m", "kas_bridge")
PORT = 16117
PATIENCE = 60.0
"""Seconds for a command to start and for a router to be asked by all three protocols, on a busy machine."""


def knock(stranger: Host, host: Host) -> bool:
    """Whether somebody to whom nothing was ever sent gets in at the router's port."""
    with stranger.socket() as sock:
        sock.settimeout(1.0)
        try:
            sock.connect((host.public_address, PORT))
        except OSError:
            return False
        return True


@pytest.mark.parametrize(("service", "by"), [("pcp", "PCP"), ("natpmp", "NAT-PMP"), ("upnp", "UPnP")])
def test_the_router_s_port_is_shown_while_the_bridge_runs_and_given_back_when_it_ends(
    lab: RunningLab, tmp_path: Path, service: str, by: str
) -> None:
    home, stranger = lab.home("home", nat="pr", services=(service,)), lab.public("stranger")
    data_dir = f"--data-dir={tmp_path / 'bridge'}"
    bridge = home.spawn([*COMMAND, "run", data_dir, "--rpc=off", "--json"])
    bridge.expect('"event": "port-mapped"', timeout=PATIENCE)

    def status(*flags: str) -> str:
        return home.run([*COMMAND, "status", data_dir, *flags], timeout=PATIENCE).stdout

    told: dict[str, Any] = json.loads(status("--json"))["port_mapping"]
    [mapping] = told["mappings"]
    assert (mapping["by"], told["wanted"], told["problem"]) == (by.lower(), True, "")
    assert mapping["local"] == f"/ip4/{home.address}/tcp/{PORT}"
    assert mapping["external"] == f"/ip4/{home.public_address}/tcp/{PORT}"
    assert mapping["lifetime_s"] > 0
    assert f"router    {home.public_address}:{PORT} by {by} for" in status()
    assert knock(stranger, home)

    bridge.terminate()
    assert bridge.wait(PATIENCE) == 0
    with home.socket() as listener:  # in its place: who is let in would be heard
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((home.address, PORT))
        listener.listen()
        assert not knock(stranger, home)


def test_no_port_mapping_asks_no_router(lab: RunningLab, tmp_path: Path) -> None:
    home, stranger = lab.home("home", nat="pr", services=("pcp",)), lab.public("stranger")
    data_dir = f"--data-dir={tmp_path / 'bridge'}"
    bridge = home.spawn([*COMMAND, "run", data_dir, "--rpc=off", "--json", "--no-port-mapping"])
    bridge.expect('"event": "bridge-started"', timeout=PATIENCE)
    told = json.loads(home.run([*COMMAND, "status", data_dir, "--json"], timeout=PATIENCE).stdout)["port_mapping"]
    assert told == {"wanted": False, "mappings": [], "problem": ""}
    assert not knock(stranger, home)
    bridge.terminate()
    assert bridge.wait(PATIENCE) == 0
