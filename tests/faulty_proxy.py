"""A proxy between a client and its server that does to the next requests what networks and busy servers do (`FaultyProxy`)."""

import http.client
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from json_server import Server

FAULTS = ("reset", "429", "500", "503", "slow", "trickle", "truncated", "truncated_unsized")
TIMED = ("slow", "trickle")  # they move the clock: nothing else should be under way
LONG = 1000.0  # seconds, longer than any limit of a request


class FaultyProxy:
    """Passes requests on to `target`. `faults`: what happens to the next POSTs that score something, one each; then all is well.
    `clock`: a `moved_clock.Clock`, on which each fault takes `pace` seconds and the slow ones take long."""

    def __init__(self, target, clock, retry_after=None, pace=0.0):
        self.target, self.faults, self.retry_after = urlsplit(target), [], retry_after
        self.clock, self.pace = clock, pace
        self.scored = 0  # POSTs that asked for scores, faults included
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.next_fault() if self.path in ("/v1/completions", "/generate") else None
                proxy.handle(self, body, fault)

            do_GET = do_POST = handle_any

            def log_message(self, *arguments):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.stop()

    def next_fault(self):
        with self._lock:
            self.scored += 1
            return self.faults.pop(0) if self.faults else None

    def handle(self, request, body, fault):
        if fault is not None:
            self.clock.move(self.pace)
        if fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        if fault in ("429", "500", "503"):
            self.send(
                request, int(fault), b'{"error": {"message": "come\\nback later"}}', {"Retry-After": self.retry_after}
            )
            return
        if fault == "slow":
            self.clock.move(LONG)
            request.connection.recv(1)  # until the client hangs up
            request.close_connection = True
            return
        connection = http.client.HTTPConnection(self.target.hostname, self.target.port, timeout=120)
        try:
            headers = {
                name: value for name, value in request.headers.items() if name.lower() not in ("host", "connection")
            }
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            status, content = answer.status, answer.read()
        except OSError:  # no server there: the client finds none either
            request.close_connection = True
            return
        finally:
            connection.close()
        if fault is None:
            self.send(request, status, content)
        elif fault == "truncated":
            self.send(request, status, content, sent=len(content) // 2)
        elif fault == "truncated_unsized":
            self.send(request, status, content, sent=len(content) // 2, sized=False)
        elif fault == "trickle":
            self.send(request, status, content, drip=LONG / 100)
        else:
            raise ValueError(fault)

    def send(self, request, status, content, headers=None, sent=None, sized=True, drip=None):
        request.send_response(status)
        for name, value in (headers or {}).items():
            if value is not None:
                request.send_header(name, value)
        if sized:
            request.send_header("Content-Length", str(len(content)))
        if sent is not None:
            request.send_header("Connection", "close")
        request.end_headers()
        if drip is None:
            request.wfile.write(content if sent is None else content[:sent])
        else:
            for i in range(len(content) - 1):  # never whole
                request.wfile.write(content[i : i + 1])
                self.clock.move(drip)
            request.connection.recv(1)
        request.close_connection = sent is not None
