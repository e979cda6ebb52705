"""One task that waits until another wakes it: what a ``trio.Event`` does, at a third of its cost, again and again."""

from __future__ import annotations

from typing import Any

import trio
from trio.lowlevel import Abort, current_task, reschedule, wait_task_rescheduled


class Waiter:
    """A place where at most one task waits.

    Attributes:
        task: the task that waits here, if one does.
    """

    __slots__ = ("task",)

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        """Wait for `wake`. A wake that comes while nobody waits is not remembered."""
        self.task = current_task()
        await wait_task_rescheduled(self._abort)

    def _abort(self, _: Any) -> Abort:
        self.task = None
        return Abort.SUCCEEDED

    def wake(self) -> None:
        """Wake the task that waits here, if one does."""
        task = self.task
        if task is not None:
            self.task = None
            reschedule(task)
