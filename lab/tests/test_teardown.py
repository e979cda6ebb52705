"""Nothing is left behind, whatever happens."""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import natlab
from natlab import Lab, LabError, home, plan, public
from natlab.running import RunningLab, detached

ROOT = Path(natlab.__file__).parent.parent
PAIR = Lab((home("alice"), public("relay")))


def _wait_for_end(pids, seconds=10.0):
    """Until all these processes are gone."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], f"{pid} is still there"
        finally:
            os.close(fd)


def _start(body):
    """A process of its own that builds a lab and prints process ids; then it does as told."""
    code = textwrap.dedent(
        f"""
        import os, sys, threading, time
        sys.path.insert(0, {str(ROOT)!r})
        import natlab
        lab = natlab.RunningLab(natlab.Lab((natlab.home("alice", delay="5ms"), natlab.public("relay"))))
        lab.capture()
        one = lab["alice"].spawn([sys.executable, "-S", "-c", "import time; time.sleep(1000)"])
        two = lab["alice"].spawn(["sh", "-c", "setsid sleep 1000 & sleep 1000"])
        three = lab["relay"].spawn_python(time.sleep, 1000)
        print(lab._process.pid, lab.pid, one.pid, two.pid, three.pid, flush=True)
        """
    ) + textwrap.dedent(body)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    pids = [int(each) for each in process.stdout.readline().split()]
    assert len(pids) == 5
    return process, [*pids, *_inside(pids[1])]


def _inside(init):
    """Every process in the PID namespace of a lab's first process."""
    wanted = os.stat(f"/proc/{init}/ns/pid").st_ino
    found = []
    for each in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{each}/ns/pid").st_ino == wanted:
                found.append(int(each))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("body", "kill"),
    [
        ("time.sleep(1000)", signal.SIGKILL),
        ("time.sleep(1000)", signal.SIGINT),
        ("lab.close()\ntime.sleep(1000)", None),
        ("os._exit(1)", None),
        ("raise RuntimeError", None),
        # A child that outlives it holds copies of its file descriptors.
        ("if os.fork():\n    os.kill(os.getpid(), 9)\ntime.sleep(3)", None),
    ],
    ids=["kill -9", "Ctrl-C", "close", "exit", "exception", "kill -9 with a child"],
)
def test_a_lab_ends_with_its_process(body, kill):
    process, pids = _start(body)
    try:
        if kill:
            process.send_signal(kill)
        _wait_for_end(pids)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("which", [0, 1], ids=["keeper", "init"])
def test_a_lab_ends_with_its_own_first_processes(which):
    process, pids = _start("time.sleep(1000)")
    try:
        os.kill(pids[which], signal.SIGKILL)
        _wait_for_end(pids[:2] + pids[5:])
    finally:
        process.kill()
        process.communicate()


def test_a_lab_whose_process_is_gone_says_so_and_keeps_its_logs(tmp_path):
    with RunningLab(PAIR, quiet=True) as lab:
        lab["alice"].run(["echo", "last words"])
        os.kill(lab.pid, signal.SIGKILL)
        with pytest.raises(LabError, match="the lab's process is gone"):
            lab["alice"].run(["true"])
        with pytest.raises(LabError, match="the lab is closed"):
            lab["alice"].run(["true"])
        (log,) = lab.save(tmp_path)
        assert log.read_text() == "last words\n"
    assert lab.save(tmp_path) == []


def test_a_lab_outlives_the_thread_that_made_it():
    made = []
    thread = threading.Thread(target=lambda: made.append(RunningLab(PAIR)))
    thread.start()
    thread.join()
    with made[0] as lab:
        assert lab["alice"].run(["echo", "still"]).stdout == "still\n"


def _left():
    """Namespaces of all processes, file descriptors of ours, mounts, temporary files of ours, detached labs."""
    namespaces = set()
    for each in filter(str.isdigit, os.listdir("/proc")):
        for kind in ("net", "user", "pid", "mnt"):
            try:
                namespaces.add((kind, os.stat(f"/proc/{each}/ns/{kind}").st_ino))
            except OSError:
                continue
    return {
        "namespaces": len(namespaces),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "names": sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else [],
        "detached": detached(),
    }


def test_labs_in_a_row_and_side_by_side_leave_nothing_behind():
    """A few; lab/bench/leaks.py does 200 in a row and 8 side by side."""

    def one(_):
        with RunningLab(PAIR) as lab:
            lab.capture()
            assert lab["alice"].run(["echo", "x"]).stdout == "x\n"
            assert lab["alice"].python(os.getpid) > 0
            return lab._process.pid

    one(0)
    before = _left()
    pids = [one(number) for number in range(5)]
    with ThreadPoolExecutor(4) as pool:
        pids += pool.map(one, range(8))
    _wait_for_end(pids)
    after = _left()
    assert after["namespaces"] <= before["namespaces"]
    assert {**after, "namespaces": 0} == {**before, "namespaces": 0}


def test_a_detached_lab_stays_until_it_is_ended():
    with RunningLab(Lab((home("alice", "sym", hairpin=True, delay=0.001), public("relay")), seed=3)) as lab:
        id = lab.detach()
        topology, pid = lab.topology, lab.pid
    assert id in detached()
    with RunningLab.attach(id) as lab:
        assert lab.topology == topology
        assert lab["alice"].run(["echo", "there"]).stdout == "there\n"
        lab.router("alice").reboot()
        address = lab.router("alice").change_address()
        lab.home("bob")
    with RunningLab.attach(id) as lab:
        assert lab["alice"].public_address == lab.router("alice").address == address
        assert lab.router("alice").change_address() not in (address, "11.1.0.2")
        assert lab["bob"].public_address == "11.3.0.2"
        lab.down()
    _wait_for_end([pid])
    assert id not in detached()
    with pytest.raises(LabError, match=f"there is no lab '{id}' of yours"):
        RunningLab.attach(id)


def test_a_failed_start_leaves_nothing():
    before = _left()["descriptors"]
    with RunningLab(PAIR) as lab, pytest.raises(LabError, match="there is a namespace alice already"):
        lab._build(plan.Plan(("alice",), ()))
    assert _left()["descriptors"] == before


@pytest.mark.skipif(os.getuid() != 0, reason="this already runs without root")
def test_without_root_it_is_the_same():
    """As user nobody, with an interpreter that this user may run."""
    python = next((each for each in ("/usr/bin/python3", sys.executable) if _usable(each)), None)
    if python is None:
        pytest.skip("there is no Python 3.11 or newer that user nobody may run")
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        shutil.copytree(ROOT / "natlab", Path(root, "natlab"), ignore=shutil.ignore_patterns("__pycache__"))
        code = _CODE.format(root=root)
        done = subprocess.run([python, "-c", code], **user, capture_output=True, text=True, cwd="/")
    if "Unsupported" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout.split() == ["65534", "11.1.0.2", "alice", "True"], done.stderr


_CODE = """
import os, socket, sys, time
sys.path.insert(0, {root!r})
import natlab
with natlab.RunningLab(natlab.Lab((natlab.home("alice", delay="20ms"), natlab.public("relay")))) as lab:
    with lab["alice"].socket(socket.AF_INET, socket.SOCK_DGRAM) as a, \
            lab["relay"].socket(socket.AF_INET, socket.SOCK_DGRAM) as b:
        b.bind(("0.0.0.0", 9))
        a.settimeout(5)
        b.settimeout(5)
        start = time.monotonic()
        a.sendto(b"x", (lab["relay"].address, 9))
        origin = b.recvfrom(9)[1]
        b.sendto(b"y", origin)
        a.recv(9)
        took = time.monotonic() - start
    print(os.getuid(), origin[0], lab["alice"].python(os.getenv, "NATLAB_HOST"), took >= 0.04)
"""


def _usable(python):
    try:
        done = subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
            user="nobody",
            group="nogroup",
            extra_groups=[],
            capture_output=True,
        )
    except OSError:
        return False
    return done.returncode == 0
