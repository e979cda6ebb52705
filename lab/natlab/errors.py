"""What can go wrong, as a small tree. Every text is one sentence that says what to do next.

::

    LabError
    ├── TopologyError    the described network can't exist: a name clash, an unknown type, a contradiction
    ├── Unsupported      this system can't hold a lab: a tool or a right is missing (pytest skips)
    ├── CommandFailed    a command in a host ended with another status than 0
    └── RemoteError      a function in a host raised something that can't travel; the traceback is in the text
"""

from __future__ import annotations


class LabError(Exception):
    """Anything that a lab has to say."""


class TopologyError(LabError, ValueError):
    """The topology can't exist."""


class Unsupported(LabError):
    """This system can't hold a lab; the text says what to install or to allow."""


class CommandFailed(LabError):
    """A command in a host failed.

    Attributes:
        status: its exit status; negative: the signal that ended it.
        stdout, stderr: what it wrote.
    """

    def __init__(self, text: str, status: int, stdout: str, stderr: str) -> None:
        super().__init__(text)
        self.status, self.stdout, self.stderr = status, stdout, stderr


class RemoteError(LabError):
    """A function in a host raised an exception that can't be pickled."""
