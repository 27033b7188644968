"""SIGTERM, as ``kill`` and schedulers send it: a command ends at once and cleans up, a training saves itself first."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

AGAIN = "nothing half-written was left behind"
STATUS = 128 + signal.SIGTERM


class Stopped(SystemExit):
    """Ends the process with status 143.

    Attributes:
        told: what to tell the user; empty in all but one process of a run.
    """

    def __init__(self, told: str):
        super().__init__(STATUS)
        self.told = told


class _Sigterm:
    """The handler. One that comes while another is answered changes nothing: launchers pass it on a second time."""

    def __init__(self) -> None:
        self.asked = self.deferred = False
        self.again = AGAIN

    def __call__(self, *_: object) -> None:
        first, self.asked = not self.asked, True
        if first and not self.deferred:
            raise Stopped(f"stopped by SIGTERM; {self.again}" if os.environ.get("RANK", "0") == "0" else "")


_sigterm = _Sigterm()


@contextlib.contextmanager
def ended_by_sigterm(again: str = AGAIN) -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Stopped`, so that what is half done is cleaned up. For the main thread only.

    Args:
        again: what tells the user how to go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _sigterm.again = again
    before = signal.signal(signal.SIGTERM, _sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _sigterm.asked = _sigterm.deferred = False  # what this process does next was not asked to stop
        _sigterm.again = AGAIN


def asked() -> bool:
    """Whether SIGTERM came, to a command that still runs."""
    return _sigterm.asked


def again() -> str:
    """How to go on after a stop, as the command that runs has it."""
    return _sigterm.again


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is noted only; what is given tells whether it came, and the caller stops where it can go on."""
    _sigterm.deferred = True
    try:
        yield asked
    finally:
        _sigterm.deferred = False
