"""Interpreters that start from nothing, beside the test process and not out of it."""

from __future__ import annotations

import os
import subprocess
import sys


def start(title: str, code: str, fd: int, *options: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Run Python code in an interpreter of its own, which inherits one file descriptor.

    The code goes by standard input: debuggers put themselves into ``python -c`` and ``python file.py``, and in a lab
    there is no way back to them. It is in a session of its own, so that a Ctrl-C in the terminal is for the test.

    Args:
        title: what a list of processes shows.
        options: of the interpreter.
        stderr: as for `subprocess.Popen`.
    """
    program = os.memfd_create(title)
    try:
        os.write(program, code.encode())
        os.lseek(program, 0, os.SEEK_SET)
        return subprocess.Popen(
            [sys.executable, *options, "-", title],
            pass_fds=(fd,),
            stdin=program,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    finally:
        os.close(program)
