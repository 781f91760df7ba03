"""Chat templates: programs of a model's authors, which may refuse a prompt, fail, or not come to an end."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from simct.console import error_line

SECONDS = 30.0  # for one prompt; a template takes milliseconds


class TemplateTimeout(ValueError):
    """A template that did not come to an end."""


def apply_template(tokenizer, messages: list[dict[str, Any]], **options) -> Any:
    """The tokenizer's `apply_chat_template`. ValueError with the template's own words, on one line, if it raises anything;
    `TemplateTimeout` if it takes longer than `SECONDS` (in the main thread; another one cannot be interrupted)."""
    try:
        with _limit(SECONDS):
            return tokenizer.apply_chat_template(messages, **options)
    except TemplateTimeout:
        raise
    except Exception as error:
        raise ValueError(error_line(error)) from error


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_) -> None:
        raise TemplateTimeout(f"the chat template has not come to its end in {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        # The timer that ran before, a test's time limit say, goes on.
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3) if left else 0, interval)
        signal.signal(signal.SIGALRM, handler)
