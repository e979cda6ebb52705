"""README's first command, behind real NATs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("lab")]

PATIENCE = 180.0
"""Seconds. On an idle machine it takes a fifth of that."""


def demo(nats: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "kas_bridge", "demo", "--light", "--json", f"--nat={nats}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_two_homes_become_direct() -> None:
    found = demo("pr,eimx")
    print(*found["timeline"], sep="\n")
    assert (found["path"], found["possible"], found["reason"], found["attempts"]) == ("punched", True, "", 1)
    assert found["circuit"] < found["direct"] < found["moved"]
    assert (found["reconnects"], found["gap"]) == (0, 0), "neither node noticed"
    told = [text for _, _, text in found["timeline"]]
    stages = (
        "upgrade: we told it yes",
        "CONNECT: told it",
        "SYNC",
        "dial 1 of",
        "punched: direct",
        "moved: punched",
    )
    assert [each for each in stages if not any(text.startswith(each) for text in told)] == []


def test_two_that_can_not_know_it_and_stay_relayed() -> None:
    found = demo("pr,sym")
    print(*found["timeline"], sep="\n")
    assert (found["path"], found["possible"], found["direct"], found["moved"]) == ("relayed", False, None, None)
    assert "gives every destination another port" in found["reason"]
    assert found["blocks"] == 512
