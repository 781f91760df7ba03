"""The script that a token is written in, as far as its bytes say it."""

import unicodedata
from functools import cache

# The first word of a character's Unicode name, and what the tables call its script.
_NAMES = {
    "LATIN": "Latin",
    "CYRILLIC": "Cyrillic",
    "GREEK": "Greek",
    "CJK": "Chinese characters",
    "HIRAGANA": "Japanese kana",
    "KATAKANA": "Japanese kana",
    "HANGUL": "Hangul",
    "ARABIC": "Arabic",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari",
    "THAI": "Thai",
}
OTHER, SEVERAL = "other scripts", "several scripts"
DIGITS, PUNCTUATION, SPACE = "digits", "punctuation and symbols", "white space"
PARTIAL, SPECIAL = "pieces of characters", "special tokens"
SCRIPTS = (*dict.fromkeys(_NAMES.values()), OTHER, SEVERAL, DIGITS, PUNCTUATION, SPACE, PARTIAL, SPECIAL)


def script_of(piece: bytes | None) -> str:
    """One of SCRIPTS, for the bytes of a token; None is a special token.

    Letters decide, with their marks; without any a token is digits, then punctuation and symbols, then white space. Bytes that are
    no whole characters are "pieces of characters".
    """
    if piece is None:
        return SPECIAL
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return PARTIAL
    kinds = set(map(_kind, text))
    letters = kinds - {DIGITS, PUNCTUATION, SPACE}
    if letters == {"Chinese characters", "Japanese kana"}:
        return "Japanese kana"
    if letters:
        return letters.pop() if len(letters) == 1 else SEVERAL
    return next((kind for kind in (DIGITS, PUNCTUATION, SPACE) if kind in kinds), SPACE)


@cache
def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LM":
        return _NAMES.get(unicodedata.name(character, "").partition(" ")[0], OTHER)
    if category == "Nd":
        return DIGITS
    return SPACE if character.isspace() else PUNCTUATION
