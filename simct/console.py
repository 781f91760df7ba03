"""The terminal: where every room prints, the error for bad input, and text that cannot forge a line."""

from rich.console import Console

console = Console()
errors = Console(stderr=True)


class UsageError(Exception):
    """Bad input, found before any long work: reported without a traceback."""


def show_bytes(piece: bytes | None) -> str:
    """A token's bytes on one terminal cell run: visible blanks, escapes for what is not printable, `<special>` for None."""
    if piece is None:
        return "<special>"
    text = piece.decode("utf-8", errors="backslashreplace").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return printable(text)


def printable(text: str) -> str:
    """Text on one line, escapes for what is not printable: a token's name, say, may hold line breaks and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
