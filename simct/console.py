"""The terminal: where every room prints, the error for bad input, and text that cannot forge a line."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from simct.secrets import redact

# Paths, names and sampled text are printed as they are: no `[/x]` or `:x:` in them is a command to the terminal.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)

_LONGEST = 4000  # characters of an error's line


class UsageError(Exception):
    """Bad input, found before any long work."""


# Their messages say what was wrong; of any other error the kind has to be said as well.
TELLING = (UsageError, ValueError, OSError, ImportError, RuntimeError, FloatingPointError)


def error_line(error: BaseException | str) -> str:
    """What went wrong on one line, without keys: lines joined, escapes for what is not printable, 4,000 characters at most."""
    text = redact(error)
    if isinstance(error, BaseException) and (not text or not isinstance(error, TELLING)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = " ".join(filter(None, map(str.strip, text.splitlines())))
    more = len(text) - _LONGEST
    return printable(text[:_LONGEST]) + (f" ... ({more:,} characters more)" if more > 0 else "")


@contextmanager
def before_work() -> Iterator[None]:
    """Around what reads and checks: any error there is a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(error_line(error)) from error


def show_bytes(piece: bytes | None) -> str:
    """A token's bytes on one terminal cell run: visible blanks, escapes for what is not printable, `<special>` for None."""
    if piece is None:
        return "<special>"
    text = piece.decode("utf-8", errors="backslashreplace").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return printable(text)


def printable(text: object) -> str:
    """Text on one line, escapes for what is not printable: a token's name or a path may hold line breaks and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
