"""HTTP servers of tests, on a free port of this machine."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from typing import Any


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Handler that logs nothing, and can send an answer whole."""

    def log_message(self, *_: Any) -> None:
        pass

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def running_server(handler: Any, kind: type[Any] = http.server.ThreadingHTTPServer) -> Iterator[Any]:
    """Yield a server with its `address`, which answers by a handler's class until `with` ends.

    Args:
        handler: class of the handlers, or function that makes them.
        kind: class of the server.
    """
    with kind(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
