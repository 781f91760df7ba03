"""Time that a test moves (`Clock`): what is too slow for a limit takes no time then, and what is not may take as long as a busy
machine needs."""

import asyncio
import logging
import threading
import time
import weakref
from contextlib import contextmanager, suppress

import pytest

import simct.client


class Clock:
    """The clock of the event loops that are made while it is installed: the machine's, and what `move` has put on it."""

    def __init__(self):
        self.ahead, self._loops = 0.0, weakref.WeakSet()

    def time(self):
        return time.monotonic() + self.ahead

    def new_loop(self):
        loop = asyncio.SelectorEventLoop()
        loop.time = self.time
        self._loops.add(loop)
        return loop

    def move(self, seconds):
        self.ahead += seconds
        for loop in list(self._loops):
            with suppress(RuntimeError):  # closed
                loop.call_soon_threadsafe(lambda: None)  # it looks at the clock again

    def move_next(self, seconds):
        """As soon as what runs in a loop now waits for something."""
        for loop in list(self._loops):
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self.move, seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(asyncio.events, "new_event_loop", clock.new_loop)
    return clock


@pytest.fixture
def at_once(monkeypatch):
    """Requests are sent again after milliseconds."""
    monkeypatch.setattr(simct.client, "FIRST_DELAY", 0.01)


@contextmanager
def on_retry(function):
    """`function(message)` is called whenever a client waits to send a request again."""

    class Handler(logging.Handler):
        def emit(self, record):
            if "once more in" in record.getMessage():
                function(record.getMessage())

    handler = Handler()
    level = simct.client.logger.level
    simct.client.logger.setLevel(logging.INFO)
    simct.client.logger.addHandler(handler)
    try:
        yield
    finally:
        simct.client.logger.removeHandler(handler)
        simct.client.logger.setLevel(level)


@contextmanager
def retried():
    """An event that is set when a client has met a failure and waits."""
    event = threading.Event()
    with on_retry(lambda message: event.set()):
        yield event
