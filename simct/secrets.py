"""Keys and passwords: checked when they are read, remembered, and taken out of what is printed or written."""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

HIDDEN = "***"
SHORTEST = 4  # characters of what is hidden: fewer are no secret, and part of many a word
NAMES = ("token", "use_auth_token", "hub_token", "push_to_hub_token", "api_key", "password", "secret", "authorization")

_known: set[str] = set()
_USER = re.compile(r"(?<=://)\S{0,256}@")  # of an address: user:password@, where a password may have a slash in it
_NAMED = re.compile(
    r"((?:token|key|password|secret|authorization)\w*['\"]?\s*[:=]|--\w*(?:token|key|password|secret)\w*(?=\s)).*",
    re.DOTALL | re.IGNORECASE,
)
_QUERY = re.compile(r"(?<=[?&])([^=?&\s#'\"]{1,64}=)[^&\s#'\"]+")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://\S+")  # bounded: a message may be long, and a server's
_HUB_TOKEN = re.compile(r"\bhf_\w{8,}")


def hide(*secrets: str | None) -> None:
    """From now on `redact` takes these texts out, as they are and as an address spells them."""
    for secret in secrets:
        if secret and len(secret) >= SHORTEST:
            _known.update((secret, quote(secret, safe="")))


def redact(text: object) -> str:
    """A message without secrets: those that are known, a user, password or query value inside an address, a token of the hub."""
    text = str(text)
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _ADDRESS.sub(lambda found: _QUERY.sub(rf"\1{HIDDEN}", found[0]), text)
    return _HUB_TOKEN.sub(HIDDEN, text)


def shown_value(name: str, value: Any) -> str:
    """An option's value as a message names it: what is in a key's place is not shown."""
    return HIDDEN if name.split()[-1] in NAMES else shown_text(repr(value))


def shown_text(text: object) -> str:
    """Options that cannot be read (broken JSON, unknown words of a command line): nothing of what follows a secret's name."""
    return redact(_NAMED.sub(rf"\1 {HIDDEN}", str(text)))


def read_key(name: str, given: str | None, variable: str | None = None) -> str | None:
    """A key without the white space around it (a key file ends with a line break); None for none. Hidden from here on.

    Args:
        name: the argument that it is given as.
        given: its value; if None, that of the environment's `variable`.
    Raises:
        ValueError: a character that no HTTP header can carry. The message does not show the key.
    """
    if given is None and variable is not None:
        name, given = variable, os.environ.get(variable)
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{name} is of type {type(given).__name__}: expected a text")
    key = (given or "").strip()
    for position, character in enumerate(key, start=1):
        if not "!" <= character <= "~":
            raise ValueError(
                f"{name} has U+{ord(character):04X} as character {position} of {len(key)}: expected a key of visible ASCII"
            )
    hide(key)
    return key or None


def read_address(name: str, given: str) -> str:
    """The address of a server, without a slash at its end. A path in it (of a gateway) is hidden from here on: it may be a key.

    Raises ValueError, without what may be secret in it, for what is not "http://HOST:PORT" (a path may follow), and for a user, a
    password or a query inside.
    """
    given = str(given).strip()
    shown = shown_address(given)
    # By hand: where a password has a slash in it, no parser finds the user.
    user, query = given.partition("://")[2].rpartition("@")[0], re.split(r"[?#]", given, maxsplit=1)[1:]
    if "@" in given or query:
        hide(user, user.partition(":")[2], *query, *(value for part in query for _, value in parse_qsl(part)))
        raise ValueError(
            f"{name} {shown!r} was given with a user or key in it, which would be logged: expected the address alone"
        )
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is none, half an IPv6 address
        usable = False
    if not usable or given.rstrip("/").endswith("/v1"):
        raise ValueError(f"{name} is {shown!r}: expected 'http://HOST:PORT', without '/v1'")
    hide(*(part for part in parts.path.split("/") if len(part) >= 2 * SHORTEST))
    return given.rstrip("/")


def shown_address(address: str) -> str:
    """Scheme, host and port of an address: what may be shown of it. A path becomes `/***`, but for a lone "/v1"."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return HIDDEN
    if "@" in parts.path or not (parts.scheme and parts.netloc):  # a password with a slash in it; no address
        return HIDDEN if set(address) & set("@?#") else address
    path = parts.path if parts.path.rstrip("/") in ("", "/v1") else f"/{HIDDEN}"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path.rstrip('/')}"


def without_secrets(name: str, value: Any) -> Any:
    """An option's value as it may be shown and stored: no key, none inside a mapping either; of servers scheme, host and port."""
    if name in NAMES:
        return None
    if name.endswith("_url") and isinstance(value, (str, dict)):
        return shown_address(value) if isinstance(value, str) else {k: shown_address(str(v)) for k, v in value.items()}
    if type(value) is dict:
        return {key: without_secrets(str(key), part) for key, part in value.items() if key not in NAMES}
    return redact(value) if isinstance(value, str) and "://" in value else value


def hide_options(options: Mapping[str, Any]) -> None:
    """Hides what options of these names hold, in mappings also."""
    for name, value in options.items():
        if name in NAMES and isinstance(value, str):
            hide(value.strip())
        elif isinstance(value, Mapping):
            hide_options(value)
