"""The client of a server that is slow, wrong or hostile: ends in time, takes no more than it asked for, goes nowhere else."""

import gzip
import socket
import subprocess
import sys
import threading
import zlib
from types import SimpleNamespace

import pytest
from json_server import raw, replying, serving
from moved_clock import on_retry

pytest.importorskip("httpx")

from simct.client import Refused, Request, RetryingClient

ASK = Request("GET", "/ask")
PIECES = 2000  # after as many a dripping server comes to its end


def chunk(content):
    return b"%x\r\n%s\r\n" % (len(content), content)


# ---- In time ----

OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n"
PACKED = zlib.compressobj(wbits=31)
DRIPS = {  # what comes first, again and again, and at the end
    "headers": (OK, b"X: y\r\n", b"Content-Length: 2\r\n\r\n{}"),
    "a header": (OK + b"X: ", b"y", b"\r\nContent-Length: 2\r\n\r\n{}"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"Content-Length: 2\r\n\r\n{}"),
    "a chunk's extension": (OK + CHUNKED + b"\r\n2;", b"x", b"\r\n{}\r\n0\r\n\r\n"),
    "trailers": (OK + CHUNKED + b"\r\n2\r\n{}\r\n0\r\n", b"X: y\r\n", b"\r\n"),
    "the content": (OK + b"Content-Length: %d\r\n\r\n{" % (PIECES + 2), b" ", b"}"),
    "empty gzip blocks": (
        OK + CHUNKED + b"Content-Encoding: gzip\r\n\r\n" + chunk(gzip.compress(b"")[:10]),
        chunk(b"\0\0\0\xff\xff"),
        chunk(PACKED.compress(b"{}") + PACKED.flush()),
    ),
}


@pytest.mark.parametrize("part", DRIPS)
def test_no_part_of_an_answer_outlasts_the_limit(part, clock):
    first, again, last = DRIPS[part]

    def answer(send):
        send(first)
        for _ in range(PIECES):
            clock.move(1)
            send(again)
        send(last)

    with raw(answer) as url, pytest.raises(TimeoutError, match="/ask did not answer within 30 seconds"):
        RetryingClient(url, timeout=30, patience=0).call(ASK)


def test_an_answer_that_drips_in_time_is_read():
    def answer(send):
        for byte in OK + CHUNKED + b"\r\n2;x\r\n{}\r\n0\r\nX: y\r\n\r\n":
            send(bytes([byte]))

    with raw(answer) as url:
        assert RetryingClient(url).call(ASK) == {}


BATCH = """
import sys
from simct.client import Refused, Request, RetryingClient
try:
    RetryingClient(sys.argv[1], timeout=3600).call_all([Request("GET", "/ask")] * 2)
except Refused:
    print("refused")
"""


def test_the_interpreter_ends_with_its_last_line():
    """One request is refused while another one's answer drips: when that is caught nothing is waited for."""
    first, ended, dripping = threading.Lock(), threading.Event(), threading.Event()

    def answer(send):
        if first.acquire(blocking=False):
            send(OK)
            dripping.set()
            while not ended.wait(0.02):
                send(b"X: y\r\n")
        else:
            dripping.wait()
            send(b"HTTP/1.1 400 No\r\nContent-Length: 2\r\n\r\n{}")

    with raw(answer) as url:
        done = subprocess.run([sys.executable, "-c", BATCH, url], capture_output=True, text=True, timeout=300)
        ended.set()
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_a_loop_that_runs_already_does_not_matter():
    """In a notebook everything runs inside of one."""
    import asyncio

    async def cell(url):
        return RetryingClient(url).call(ASK)

    with replying(body=[3]) as (url, _):
        assert asyncio.run(cell(url)) == [3]


@pytest.mark.parametrize("after", ["1e300", "inf", "99999999999", "Fri, 31 Dec 9999 23:59:59 GMT", "-5", "nan", "soon"])
def test_a_time_to_come_back_is_capped(after, clock):
    said = []

    def waiting(message):
        said.append(message)
        clock.move_next(61)

    def answer(send):
        head = b"HTTP/1.1 503 Busy\r\nRetry-After: %s\r\n" % after.encode() if not said else OK
        send(head + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")

    with raw(answer) as url, on_retry(waiting):
        assert RetryingClient(url, patience=100).call(ASK) == {}
    seconds = float(said[0].split()[-2])
    assert seconds == 60 if after[0] in "1i9F" else 0 < seconds <= 0.5


# ---- No more than that ----

BOMB = gzip.compress(b"[" + b"0," * 5_000_000 + b"0]")


@pytest.mark.parametrize(
    "body, headers",
    [
        (b"[" + b"0," * 600_000 + b"0]", {}),
        (BOMB, {"Content_Encoding": "gzip"}),
        (gzip.compress(b"{}")[:10] + b"\0\0\0\xff\xff" * 300_000, {"Content_Encoding": "gzip"}),
    ],
    ids=["plain", "unpacked", "packed"],
)
def test_an_answer_longer_than_any_is_not_read_to_its_end(body, headers):
    assert len(BOMB) < 20_000
    ask = Request("GET", "/ask", limit=1_000_000)
    with replying(body=body, **headers) as (url, asked):
        with pytest.raises(RuntimeError, match="/ask sends more than 1,000,000 bytes"):
            RetryingClient(url, patience=1e6).call(ask)
    assert len(asked) == 1


def test_packed_answers_are_read():
    with replying(body=gzip.compress(b'{"a": 1}'), Content_Encoding="gzip") as (url, _):
        assert RetryingClient(url).call(ASK) == {"a": 1}
    with replying(body=b"{}", Content_Encoding="br") as (url, _):
        with pytest.raises(ConnectionError, match="packed by 'br', where gzip was asked for"):
            RetryingClient(url, patience=0).call(ASK)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"[1, 2", b"\xff\xfe", b""], ids=["deep", "short", "bytes", "nothing"]
)
def test_what_is_no_json_is_asked_for_again(body):
    with replying(body=body) as (url, _), pytest.raises(RuntimeError, match="/ask answered what is no whole JSON"):
        RetryingClient(url, patience=0).call(ASK)


def test_an_error_page_without_end_is_read_for_its_first_words():
    def answer(send):
        send(b"HTTP/1.1 400 No\r\n" + CHUNKED + b"\r\n" + chunk(b"the engine is dead "))
        while True:
            send(chunk(b"x" * 10_000))

    with raw(answer) as url, pytest.raises(Refused, match="/ask answered 400: the engine is dead x") as error:
        RetryingClient(url).call(ASK)
    assert len(str(error.value)) < 700


# ---- Nowhere else, and nothing of one's own ----


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status):
    with replying(body={}) as (other, asked):
        with replying(status, Location=f"{other}/steal?key=s3cret") as (url, _):
            with pytest.raises(
                Refused, match=rf"answered {status}: a redirect to {other}/\*\*\*, which is not followed"
            ):
                RetryingClient(url, api_key="a-key-of-mine").call(ASK)
    assert not asked


def test_no_password_of_a_netrc_is_sent(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password of-the-netrc\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent = []

    def answer(method, path, body, authorization):
        sent.append(authorization)
        return 200, {}

    with serving(SimpleNamespace(answer=answer)) as url:
        RetryingClient(url).call(ASK)
        RetryingClient(url, api_key="mine").call(ASK)
    assert sent == [None, "Bearer mine"]


# ---- Errors by another name ----


@pytest.mark.parametrize(
    "body, said",
    [
        ({"error": {"message": "engine\nis dead", "code": 500.5}}, "engine is dead"),
        ({"error": "out of \x1b[31mmemory"}, "out of \N{REPLACEMENT CHARACTER}\\[31mmemory"),
        ({"object": "error", "message": "no such model", "code": 404}, "no such model"),
    ],
)
def test_an_error_with_status_200_is_one(body, said):
    with replying(body=body) as (url, _), pytest.raises(Refused, match=f"/ask answered an error: {said}"):
        RetryingClient(url).call(ASK)


@pytest.mark.usefixtures("at_once")
def test_an_error_with_status_200_that_may_pass_is_asked_again():
    with replying(body={"error": {"message": "overloaded", "code": 503}}) as (url, asked):
        with pytest.raises(RuntimeError, match=r"/ask answered an error: overloaded \(\d+ tries in 0.5 seconds\)"):
            RetryingClient(url, patience=0.5).call(ASK)
    assert len(asked) > 1


def test_what_a_connection_failed_of_is_said():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"no whole answer from {url}/ask .*refused|Connect call failed"):
        RetryingClient(url, patience=0).call(ASK)


def test_a_request_that_is_sent_once_has_a_connection_of_its_own():
    """A server that closes a kept connection when the next request comes in on it, as one does whose patience with it has ended."""

    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            with connection:
                while b"\r\n\r\n" not in connection.recv(65536):
                    pass
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                connection.settimeout(5)
                connection.recv(65536)  # the next request, or the client's own end

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        client = RetryingClient(f"http://127.0.0.1:{listener.getsockname()[1]}", connections=1, again=False, patience=0)
        assert client.call_all([Request("GET", "/a")] * 3) == [{}] * 3
