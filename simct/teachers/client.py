"""HTTP to a server that may be busy, restarting or out of reach for a while (`RetryingClient`). Knows no format and no tokens.

Sent again: connections that fail or break, answers that take too long or end early, and the statuses with which a server says that
it may do better later (429, 500, 502, 503, 504; a `Retry-After` is obeyed). Everything else is the server's last word.
"""

import email.utils
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

LATER = (408, 429, 500, 502, 503, 504)
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds

logger = logging.getLogger(__name__)


class Refused(ValueError):
    """A status that asking again will not change. `message`: the server's own words, on one line."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} answered {status}: {message}")
        self.status, self.message = status, message


class Cancelled(Exception):
    """Another request of the same batch has failed: nobody waits for this one."""


class RetryingClient:
    """A client of one server, safe to use from several threads.

    Args:
        base_url: "http://HOST:PORT", without "/v1".
        api_key: sent as a bearer token; kept nowhere else.
        timeout: seconds that one answer may take, to its last byte.
        patience: seconds for which a request that fails is sent again, counted from its first failure. 0: never.
        connections: most of them at a time.
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
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("httpx is not installed: pip install 'simct[served]'") from error
        if not base_url.startswith(("http://", "https://")) or base_url.rstrip("/").endswith("/v1"):
            raise ValueError(f"base_url is {_without_user(base_url)!r}: expected 'http://HOST:PORT', without '/v1'")
        if _without_user(base_url) != base_url:
            raise ValueError(
                f"base_url {_without_user(base_url)!r} was given with a user or key in it, which would be logged: "
                "expected the address alone"
            )
        if not timeout > 0 or not patience >= 0 or connections < 1:
            raise ValueError(
                f"timeout is {timeout}, patience {patience} and concurrency {connections}: expected more than 0 seconds, "
                "0 seconds or more, and at least 1"
            )
        self._httpx = httpx
        self.base_url, self.timeout, self.patience = base_url.rstrip("/"), timeout, patience
        self._reading = threading.Lock()
        self.interruptions = 0  # failures after which the server may be another one: all but 429
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def call(
        self,
        method: str,
        route: str,
        body: Mapping[str, Any] | None = None,
        *,
        read: Callable[[Any], Any] = lambda answer: answer,
        patience: float | None = None,
        cancelled: threading.Event | None = None,
    ) -> Any:
        """What `read` makes of the JSON that a route answers. One answer is read at a time: as Python objects they are large.

        Raises Refused for a status that is final; PermissionError for 401 and 403; ConnectionError, TimeoutError or RuntimeError,
        by the last failure, when `patience` (default: the client's) is used up; Cancelled once `cancelled` is set.
        """
        patience = self.patience if patience is None else patience
        cancelled = cancelled or threading.Event()
        attempt, deadline = 0, None
        while True:
            if cancelled.is_set():
                raise Cancelled
            try:
                return self._once(method, self.base_url + route, body, read)
            except _Later as failure:
                self.interruptions += not failure.busy
                now = time.monotonic()
                deadline = now + patience if deadline is None else deadline
                attempt += 1
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)
                delay = max(delay, failure.retry_after)
                if now + delay > deadline:
                    tries = f" ({attempt} tries in {patience:g} seconds)" if attempt > 1 else ""
                    if failure.retry_after > patience > 0:
                        tries = f" (it asks for {failure.retry_after:g} seconds, patience is {patience:g})"
                    raise failure.kind(f"{failure}{tries}") from failure.__cause__
                level = logging.WARNING if attempt == 1 else logging.INFO
                logger.log(level, "%s; once more in %.1f seconds", failure, delay)
            cancelled.wait(delay)

    def _once(self, method: str, url: str, body, read: Callable[[Any], Any]) -> Any:
        httpx, started = self._httpx, time.monotonic()
        try:
            with self._http.stream(method, url, json=body) as answer:
                content = bytearray()
                for chunk in answer.iter_bytes():
                    content += chunk
                    if time.monotonic() - started > self.timeout:  # httpx's own limit is for each read
                        raise httpx.ReadTimeout("the answer comes too slowly")
        except httpx.TimeoutException as error:
            raise _Later(f"{url} did not answer within {self.timeout:g} seconds", TimeoutError) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ValueError(f"base_url is {self.base_url!r}: {error}") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            if _certificate_failed(error):
                raise ConnectionError(f"{url} has no certificate that this machine trusts: {error}") from error
            raise _Later(f"no whole answer from {url} ({error or type(error).__name__})", ConnectionError) from error
        if answer.status_code in LATER:
            after = _seconds(answer.headers.get("Retry-After"))
            busy = answer.status_code == 429
            raise _Later(f"{url} answered {answer.status_code}: {_message(content)}", RuntimeError, after, busy)
        if answer.status_code in (401, 403):
            raise PermissionError(f"{url} answered {answer.status_code}: {_message(content)}")
        if answer.status_code != 200:
            raise Refused(url, answer.status_code, _message(content))
        with self._reading:
            try:
                found = json.loads(content)
            except ValueError as error:  # cut short, by something that did not say how long it would be
                raise _Later(f"{url} answered what is no whole JSON ({error})", RuntimeError) from error
            return read(found)


class _Later(Exception):
    """A failure that may pass. `kind`: the exception that it is if it does not; `busy`: the server is there, and well."""

    def __init__(self, message: str, kind: type[Exception], retry_after: float = 0.0, busy: bool = False) -> None:
        super().__init__(message)
        self.kind, self.retry_after, self.busy = kind, retry_after, busy


def _seconds(header: str | None) -> float:
    """`Retry-After`: seconds, or a date."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _message(content: bytearray) -> str:
    """The server's own words, on one line: what a server says is data, and goes into logs."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found.get("message") or found.get("detail") or text
    except (ValueError, AttributeError):
        pass
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)[:500]


def _certificate_failed(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without_user(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if rest else url
