"""HTTP servers for tests: one that answers with JSON and can be stopped in the middle of a connection; any bytes (`raw`)."""

import json
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serving(double, port=0):
    """Gives the address of a server on this machine. `double.answer(method, path, JSON or None, authorization)`: (status, JSON)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(content) if content else None
            status, found = double.answer(self.command, self.path, body, self.headers.get("Authorization"))
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = handle_any

        def log_message(self, *arguments):
            pass

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.stop()


class Server(ThreadingHTTPServer):
    """One that takes its connections with it, as a killed process does."""

    daemon_threads = True

    def __init__(self, *arguments):
        self.open = set()
        super().__init__(*arguments)

    def get_request(self):
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, address):
        pass  # a client that hung up

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            try:
                connection.shutdown(2)
            except OSError:
                pass
            connection.close()


@contextmanager
def raw(answer):
    """The address of a server that answers each connection by what `answer(send)` sends, when it has read a request's head."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection):
        with connection, suppress(OSError):  # the client hung up
            connection.recv(65536)
            answer(connection.sendall)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


@contextmanager
def replying(status=200, body=None, **headers):
    """The address of a server that always says the same, and what it was asked."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    asked = []

    def answer(send):
        asked.append(1)
        length = f"Content-Length: {len(content)}\r\n"
        send(f"HTTP/1.1 {status} Some\r\nConnection: close\r\n{length}{head}\r\n".encode() + content)

    with raw(answer) as url:
        yield url, asked
