"""What holds for the whole house: its machines, its plan, its pins, and the first command's way of asking for help."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "kas_libp2p", ROOT / "bridge" / "kas_bridge"
IO = {"trio", "time", "socket", "random", "logging", "libp2p"}
MACHINES = sorted(path for package in PACKAGES for path in package.rglob("_[!_]*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_starts_with_an_underscore_does_no_io(path: Path) -> None:
    assert not IO & set(imports(path)), "a machine takes bytes and `now`, and a shell does the rest"


def test_natlab_depends_on_the_standard_library_only() -> None:
    for path in (ROOT / "lab" / "natlab").rglob("*.py"):
        others = set(imports(path)) - sys.stdlib_module_names - {"natlab"}
        assert others <= ({"pytest"} if path.name == "pytest_plugin.py" else set()), path


def test_architecture_names_every_room_and_no_other() -> None:
    rooms_told = (ROOT / "ARCHITECTURE.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    table = re.findall(r"^\| (`.*?) \|", rooms_told, re.MULTILINE)
    named: set[str] = set()
    for row in table:
        first, *more = re.findall(r"`([^`]+)`", row)
        folder = "" if first.startswith(("bridge", "lab")) else "kas_libp2p/"
        inside = f"{folder}{first.rpartition('/')[0]}/" if first.endswith(".py") and "/" in first else folder
        for path in (folder + first, *(inside + each for each in more)):
            assert (ROOT / path).exists(), f"{path} is in ARCHITECTURE.md only"
            named.add(path.removeprefix("kas_libp2p/").partition("/")[0])
    package = ROOT / "kas_libp2p"
    rooms = {path.name for path in package.glob("[!_]*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert rooms - named == set()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_types_are_for_users_too(package: Path) -> None:
    assert (package / "py.typed").exists()


# Pins


def committed() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if (path := ROOT / name).is_file()]


def test_no_package_index_is_named() -> None:
    hosts = r"pypi\.org|pythonhosted\.org|(index|static)\.crates\.io|registry\.npmjs\.org"
    lines = re.compile(rf"https?://[\w.-]*({hosts})|^\s*(--(extra-)?index-url|--find-links|-i\s|-f\s)", re.MULTILINE)
    found = [str(path.relative_to(ROOT)) for path in committed() if lines.search(path.read_text(errors="replace"))]
    assert found == []
    locks = {"Cargo.lock", "uv.lock"}  # each names its index; npm's does not with omit-lockfile-registry-resolved
    assert [path for path in committed() if path.name in locks] == []


@pytest.mark.parametrize(("name", "least"), [("-build", 3), ("", 40), ("-dev", 60)])
def test_every_requirement_is_one_version_with_hashes(name: str, least: int) -> None:
    pins = re.split(r"\n(?=\S)", (ROOT / f"requirements{name}.txt").read_text().strip())
    assert len(pins) >= least
    for pin in pins:
        assert re.match(r"[\w.-]+==\S+ (; [^\\]+)?\\\n", pin), pin
        assert re.fullmatch(r".*\\(\n    --hash=sha256:[0-9a-f]{64}( \\)?)+", pin), pin


def test_rust_crates_are_pinned_exactly() -> None:
    for manifest in ROOT.glob("tests/interop/**/Cargo.toml"):
        for name, wanted in tomllib.loads(manifest.read_text())["dependencies"].items():
            version = wanted if isinstance(wanted, str) else wanted["version"]
            assert version.startswith("="), f"{manifest}: {name} {version}"


# The first command on a machine that lacks something


@pytest.mark.parametrize(("user", "status"), [("1000", 1), ("0", 100)])
def test_setup_says_or_installs_what_the_system_lacks(user: str, status: int, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cat", "cut", "dirname", "sha256sum", "sh"):
        (tools / tool).symlink_to(Path("/usr/bin") / tool)
    (tools / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (tools / "apt-get").write_text('#!/bin/sh\necho "apt-get $*"\n[ "$1" = update ] || exit 100\n')
    for stub in ("id", "apt-get"):
        (tools / stub).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "scripts/setup"],
        cwd=ROOT,
        env={"PATH": str(tools), "VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        check=False,
    )
    lacking = "python3 python3-venv python3-dev gcc libgmp-dev"
    assert done.returncode == status
    if user == "0":
        assert f"installing what the system lacks: {lacking}" in done.stderr
        assert "apt-get update" in done.stdout
    else:
        assert done.stderr.endswith(f"  sudo apt-get install --yes {lacking}\n")
    assert not (tmp_path / "venv").exists()
