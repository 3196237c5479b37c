"""A real HTTP server on loopback that serves a folder with byte ranges and misbehaves on request."""

import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL_SECONDS = 3.0


class BadServer:
    """`faults[name]` is a list of faults, one used up by each request of that file; `always[name]` is used for ever.

    Faults: 500, 503, 404, 403, reset, stall, short, wrong-range, flip, no-range, slow-down (429)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                return

            def do_GET(self):
                owner.answer(self)

            def do_HEAD(self):
                owner.head(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fault_of(self, name):
        waiting = self.faults.get(name)
        return waiting.pop(0) if waiting else self.always.get(name)

    def tag(self, path):
        return str(path.stat().st_mtime_ns)

    def head(self, handler):
        path = self.folder / handler.path.lstrip("/")
        handler.send_response(200 if path.is_file() else 404)
        if path.is_file():
            handler.send_header("Content-Length", str(path.stat().st_size))
            handler.send_header("ETag", self.tag(path))
        handler.end_headers()

    def answer(self, handler):
        name = handler.path.lstrip("/")
        self.requests.append(name)
        fault, path = self.fault_of(name), self.folder / name
        if fault in ("500", "503", "404", "403", "429"):
            return self.send(handler, int(fault), b"no")
        if not path.is_file():
            return self.send(handler, 404, b"no such file")
        body = path.read_bytes()
        start, end = 0, len(body)
        asked = handler.headers.get("Range")
        if asked and fault != "no-range":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(body)
            if fault == "wrong-range":
                start, end = max(0, start - 7), max(0, end - 7)
        piece = bytearray(body[start:end])
        if fault == "flip":
            piece[len(piece) // 2] ^= 8
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(handler.connection.detach())
            handler.close_connection = True
            return None
        if fault == "stall":
            time.sleep(STALL_SECONDS)
        length = len(piece)
        if fault == "short":
            piece = piece[: length // 2]
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        ranged = asked and fault != "no-range"
        return self.send(handler, 206 if ranged else 200, bytes(piece), length, headers)

    def send(self, handler, status, body, length=None, headers=None):
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body) if length is None else length))
            for name, value in (headers or {}).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)
            if length is not None and length != len(body):
                handler.close_connection = True
        except OSError:
            handler.close_connection = True
