"""A child process that is killed before one of its file operations."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection


def killed_before(operation: int, action: Callable[[], None], operations: Collection[str]) -> bool:
    """Run `action` in a child that is killed for good before its n-th operation; whether it was.

    Args:
        operation: n, from 0.
        action: what the child does.
        operations: audit events that count.
    """
    child = os.fork()
    if child == 0:  # no way but _exit leads back into pytest
        seen = 0

        def hook(event: str, _: tuple[object, ...]) -> None:
            nonlocal seen
            if event in operations:
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
