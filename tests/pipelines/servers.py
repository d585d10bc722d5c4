"""A web server on this machine that serves ranges of files, counts what it sends, and fails when it is told to."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What to do with request number i of a path: None to answer it, a status, "short", "whole" (ignore the range) or "hang".
Fault = Callable[[str, int], int | str | None]


class RangeServer:
    """`url` of the folder; `sent` bytes and `requests` by file name; `fault` may be set at any time."""

    def __init__(self, folder: Path) -> None:
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.fault: Fault = lambda name, number: None
        self.released = threading.Event()  # lets hanging answers go
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self._answer(404, b"")
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(path.stat().st_size))
                self.send_header("ETag", str(path.stat().st_mtime_ns))
                self.end_headers()

            def do_GET(self) -> None:
                path = folder / self.path.lstrip("/")
                with outer.lock:
                    number = outer.requests[path.name]
                    outer.requests[path.name] += 1
                fault = outer.fault(path.name, number)
                if fault == "hang":
                    outer.released.wait(30)
                if isinstance(fault, int) or not path.is_file():
                    self._answer(fault if isinstance(fault, int) else 404, b"<html>no</html>")
                    return
                data = path.read_bytes()
                asked = self.headers.get("Range") if fault != "whole" else None
                if asked is None:
                    self._answer(200, data, path.name)
                    return
                start, _, end = asked.removeprefix("bytes=").partition("-")
                data = data[int(start) : int(end) + 1] if int(start) < len(data) else b""
                if not data:
                    self._answer(416, b"")
                    return
                self._answer(206, data[: len(data) // 2] if fault == "short" else data, path.name)

            def _answer(self, status: int, data: bytes, name: str | None = None) -> None:
                with contextlib.suppress(ConnectionError):  # who asked may have given up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    if name is not None:
                        with outer.lock:
                            outer.sent[name] += len(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def amplification(self, nbytes: dict[str, int]) -> dict[str, float]:
        """Bytes sent over the size, by file."""
        return {name: self.sent[name] / size for name, size in nbytes.items()}


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder)
    thread = threading.Thread(target=server.server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.server.shutdown()
        server.server.server_close()
        thread.join()
