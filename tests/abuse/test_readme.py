"""The tables name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.swarm import test_pylibp2p_defects

HERE = Path(__file__).parent
TESTS = HERE.parent


def existing() -> set[str]:
    found = set()
    for file in TESTS.rglob("test_*.py"):
        found |= {file.name, *re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))}
    return found


@pytest.mark.parametrize(
    "text",
    [(HERE / "README.md").read_text(encoding="utf-8"), test_pylibp2p_defects.__doc__ or ""],
    ids=["README", "py-libp2p's defects"],
)
def test_every_test_that_is_named_exists(text: str) -> None:
    named = set(re.findall(r"\btest_\w+(?:\.py)?", text))
    there = existing()
    patterns = {name for name in named if name.endswith("_")}  # one for several, as in test_defect_16_*
    assert named - patterns - there == set()
    assert all(any(test.startswith(name) for test in there) for name in patterns)
    assert len(named) > 10
