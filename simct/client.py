"""HTTP to a server that may be busy, restarting or out of reach for a while (`RetryingClient`). Knows no format and no tokens.

Sent again: connections that fail or break, answers that take too long or end early, and the statuses with which a server says that
it may do better later (429, 500, 502, 503, 504; a `Retry-After` is obeyed, up to a minute). Everything else is the server's last
word. Redirects are not followed and no .netrc is read. What a server says is shown on one line, without keys.
"""

import asyncio
import email.utils
import json
import logging
import math
import random
import ssl
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simct.secrets import read_address, redact, shown_address

LATER = (408, 429, 500, 502, 503, 504)
FIRST_DELAY, LONGEST_DELAY, LONGEST_RETRY_AFTER = 0.5, 30.0, 60.0  # seconds
CONNECT = 10.0  # seconds that a connection may take
WORDS = 64 << 10  # bytes that are read of an error

logger = logging.getLogger(__name__)


class Refused(ValueError):
    """An answer that asking again will not change. `words`: the server's own, on one line; `body`: what was asked."""

    def __init__(self, message: str, status: int = 0, words: str = "", body: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.words, self.body = status, words, body or {}


@dataclass(frozen=True)
class Request:
    """A question to a server.

    `read`: what becomes of the JSON that it answers. `limit`: bytes of the longest answer, as it comes and unpacked. `empty`: an
    answer without content is None, not one that was cut short. `apart`: called first, in a thread of its own, with the bytes of the
    answer; it gives what `read` would, or None for what it leaves to that.
    """

    method: str
    route: str
    body: Mapping[str, Any] | None = None
    read: Callable[[Any], Any] = lambda answer: answer
    limit: int = 16 << 20
    empty: bool = False
    apart: Callable[[bytes], Any] | None = None


class RetryingClient:
    """A client of one server.

    Its requests run in an event loop of their own that is gone when a call returns, also by an error or an interrupt: what is under
    way is then broken off, and nothing is left that an interpreter would wait for at its end.

    Args:
        base_url: "http://HOST:PORT", without "/v1"; shown, and kept in messages, without its path.
        api_key: sent as a bearer token; kept nowhere else.
        timeout: seconds that one answer may take in all, from connecting to its last byte.
        patience: seconds for which a request that fails is sent again, counted from its first failure. 0: never.
        connections: most of them at a time.
        again: False: only those that have not reached the server are sent again.
    Raises:
        ImportError: httpx is not installed. ValueError: an argument out of range, or a key inside the address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: float = 600.0,
        connections: int = 16,
        again: bool = True,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("httpx is not installed: pip install 'simct[served]'") from error
        self._base_url = read_address("base_url", base_url)
        if not timeout > 0 or not patience >= 0 or connections < 1:
            raise ValueError(
                f"timeout is {timeout}, patience {patience} and concurrency {connections}: expected more than 0 seconds, "
                "0 seconds or more, and at least 1"
            )
        self.base_url = shown_address(self._base_url)
        self.timeout, self.patience, self.connections, self.again = timeout, patience, connections, again
        self.interruptions = 0  # failures after which the server may be another one: all but 429
        self._httpx = httpx
        self._certificates = httpx.create_ssl_context()  # made once: it takes longer than a request
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_redacted)

        def authorised(request):
            if api_key:
                request.headers["Authorization"] = f"Bearer {api_key}"
            return request

        self._authorised = authorised

    def call(self, request: Request, **options) -> Any:
        """What `request.read` makes of the answer. Options and errors as `call_all`."""
        return self.call_all([request], **options)[0]

    def call_all(
        self,
        requests: Sequence[Request],
        *,
        patience: float | None = None,
        timeout: float | None = None,
        again: bool | None = None,
    ) -> list[Any]:
        """What becomes of the answers, in order. The first request that fails for good breaks the others off.

        Raises Refused for an answer that is final; PermissionError for 401 and 403; ConnectionError, TimeoutError or RuntimeError,
        by the last failure, when `patience` is used up. (`patience`, `timeout`, `again`: the client's if not given.)
        """
        from anyio.from_thread import start_blocking_portal  # httpx's own dependency

        options = (
            self.patience if patience is None else patience,
            self.timeout if timeout is None else timeout,
            self.again if again is None else again,
        )
        # A thread for the loop: the caller's own may have one already (a notebook's has).
        with start_blocking_portal() as portal:
            return portal.call(self._all, requests, *options)

    async def _all(self, requests: Sequence[Request], *options) -> list[Any]:
        turn = asyncio.Semaphore(self.connections)

        async def one(http, request: Request):
            async with turn:
                return await self._patiently(http, request, *options)

        timeout = self._httpx.Timeout(None, connect=CONNECT)  # each read may take as long as the whole
        # A kept connection may be closed by the server just when a request goes out on it: that one is sent once more, or, where
        # none is, has a connection of its own.
        kept = self.connections if options[2] else 0
        limits = self._httpx.Limits(max_connections=None, max_keepalive_connections=kept)
        client = self._httpx.AsyncClient(
            auth=self._authorised, timeout=timeout, limits=limits, verify=self._certificates, follow_redirects=False
        )
        try:
            async with client as http, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(http, request)) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    # httpx's own retries are of connections alone; tenacity counts from the first try, where a slow one would use patience up, and
    # would want what is below as four functions.
    async def _patiently(self, http, request: Request, patience: float, timeout: float, again: bool) -> Any:
        attempt, deadline = 0, math.inf
        while True:
            try:
                return await self._once(http, request, timeout)
            except _Later as failure:
                if not (again or failure.unsent):
                    raise failure.kind(str(failure)) from None
                self.interruptions += not failure.busy
                now = asyncio.get_running_loop().time()
                deadline = min(deadline, now + patience)
                attempt += 1
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)
                delay = max(delay, min(failure.retry_after, LONGEST_RETRY_AFTER))
                if now + delay > deadline:
                    tries = f" ({attempt} tries in {patience:g} seconds)" if attempt > 1 else ""
                    if failure.retry_after > patience > 0:
                        tries = f" (it asks for {failure.retry_after:g} seconds, patience is {patience:g})"
                    raise failure.kind(f"{failure}{tries}") from None
                level = logging.WARNING if attempt == 1 else logging.INFO
                logger.log(level, "%s; once more in %.1f seconds", failure, delay)
            await asyncio.sleep(delay)

    async def _once(self, http, request: Request, timeout: float) -> Any:
        httpx, url = self._httpx, self.base_url + request.route.partition("?")[0]
        try:
            async with asyncio.timeout(timeout):
                async with http.stream(
                    request.method,
                    self._base_url + request.route,
                    json=request.body,
                    headers={"Accept-Encoding": "gzip"},
                ) as answer:
                    limit = request.limit if answer.status_code == 200 else WORDS
                    content, whole = await _content(answer, limit)
        except httpx.ConnectTimeout:
            message = f"no connection to {url} within {CONNECT:g} seconds"
            raise _Later(message, TimeoutError, unsent=True) from None
        except TimeoutError:
            raise _Later(f"{url} did not answer within {timeout:g} seconds", TimeoutError) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ValueError(f"base_url is {self.base_url!r}: {words(error)}") from None
        except (httpx.TransportError, zlib.error) as error:
            # Errors from here on show the server's words without keys, and not the cause, which has them.
            reason = words(_cause(error))
            if isinstance(_cause(error), ssl.SSLCertVerificationError):
                raise ConnectionError(f"{url} has no certificate that this machine trusts: {reason}") from None
            unsent = isinstance(error, httpx.ConnectError)
            raise _Later(f"no whole answer from {url} ({reason})", ConnectionError, unsent=unsent) from None
        status, said = answer.status_code, _said(content) if answer.status_code != 200 else ""
        if status == 200 and not whole:
            raise RuntimeError(
                f"{url} sends more than {request.limit:,} bytes: expected no longer answer to this request"
            )
        if answer.is_redirect:
            said = f"a redirect to {shown_address(answer.headers['Location'])}, which is not followed"
        if status in LATER:
            after = _seconds(answer.headers.get("Retry-After"))
            raise _Later(f"{url} answered {status}: {said}", RuntimeError, after, busy=status == 429)
        if status in (401, 403):
            raise PermissionError(f"{url} answered {status}: {said}")
        if status != 200:
            raise Refused(f"{url} answered {status}: {said}", status, said, request.body)
        if request.empty and not content:
            return request.read(None)
        if request.apart is not None and (read := await asyncio.to_thread(request.apart, content)) is not None:
            return read
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:  # cut short, by something that did not say how long it would be
            raise _Later(f"{url} answered what is no whole JSON ({words(error)})", RuntimeError) from None
        if isinstance(found, dict) and (found.get("error") or found.get("object") == "error"):
            said = _said(content)
            if isinstance(found.get("error"), dict) and found["error"].get("code") in LATER:
                raise _Later(f"{url} answered an error: {said}", RuntimeError)
            raise Refused(f"{url} answered an error: {said}", status, said, request.body)
        return request.read(found)


class _Later(Exception):
    """A failure that may pass. `kind`: the exception that it is if it does not; `busy`: the server is there, and well; `unsent`: it
    has not got the request."""

    def __init__(
        self,
        message: str,
        kind: type[Exception],
        retry_after: float = 0.0,
        busy: bool = False,
        unsent: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind, self.retry_after, self.busy, self.unsent = kind, retry_after, busy, unsent


async def _content(answer, limit: int) -> tuple[bytes, bool]:
    """The answer's content, unpacked, and whether that is all: reading ends where it, or what came for it, passes `limit` bytes."""
    packing = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("identity", "gzip"):
        raise zlib.error(f"an answer packed by {packing!r}, where gzip was asked for")
    gzip = zlib.decompressobj(16 + zlib.MAX_WBITS) if packing == "gzip" else None
    received, content = 0, bytearray()
    async for piece in answer.aiter_raw():
        received += len(piece)
        content += piece if gzip is None else gzip.decompress(piece, limit + 1 - len(content))
        if max(received, len(content)) > limit:
            return bytes(content[:limit]), False
    return bytes(content), True


def words(said: object) -> str:
    """What a server says is data, and goes into logs: on one line, 500 characters at most, without keys."""
    text = " ".join(redact(said).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:500]


def _said(content: bytes) -> str:
    """The server's own words in the content of an error."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error") or found
        text = found if isinstance(found, str) else found.get("message") or found.get("detail") or text
    except (ValueError, AttributeError, RecursionError):
        pass
    return words(text)


def _seconds(header: str | None) -> float:
    """`Retry-After`: seconds, or a date."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):
            return 0.0
    return max(0.0, seconds) if not math.isnan(seconds) else 0.0


def _cause(error: BaseException) -> BaseException:
    """What began it: "Connection refused", where the last of a chain says "All connection attempts failed"."""
    while before := error.__cause__ or error.__context__:
        error = before
    return error if str(error) else type(error)(type(error).__name__)


LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


def _redacted(record: logging.LogRecord) -> bool:
    """httpx logs each address, httpcore (at DEBUG) each header of an answer."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True
