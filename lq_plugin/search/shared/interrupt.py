"""Ctrl-C ends a search after the running trial, a second one at once; SIGTERM after the running batch."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lq_plugin.utilities.lightning_packages import either

log = logging.getLogger(__name__)


class StopRequest:
    """A flag that is true once a signal has asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """A context that handles SIGINT and SIGTERM, and restores the former handlers at its end.

    Lightning notices SIGTERM also, and leaves its loop after the running batch.

    Python delivers signals to the main thread only: elsewhere nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            raise KeyboardInterrupt
        request.received = signal.Signals(number)
        log.warning("%s: the search stops after this trial; once more stops it at once", request.received.name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """A context for runs of a Trainer that turns Lightning's exit after a signal into a KeyboardInterrupt.

    Optuna would not notice that exit, and Lightning ignores the next Ctrl-C; here the former handler is restored.

    Raises:
        KeyboardInterrupt: instead of that exit.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error, either("utilities.exceptions.SIGTERMException")) or isinstance(
            error.__context__, KeyboardInterrupt
        ):
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt from None
        raise
