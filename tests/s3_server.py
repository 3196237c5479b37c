"""moto's S3 on loopback, in a thread of the test's own process, that misbehaves when it is asked to.

`server.fault(method, path)` is called before every request and answers None, an HTTP status ("500"), "reset", or any
function to be called before the request is served. `POST /_kill` with {"pid", "at"} arms a SIGKILL of a process at
request number `at` from then on, which is not served any more.
"""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

Fault = str | Callable[[], None] | None


class QuietHandler(MotoRequestHandler):
    def log(self, *arguments: Any) -> None:
        return


class S3Server:
    """With one empty bucket called `bucket`; `requests` are (method, path)."""

    def __init__(self) -> None:
        self.fault: Callable[[str, str], Fault] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.victim: dict[str, Any] = {}
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=QuietHandler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        url = f"{self.environment['AWS_ENDPOINT_URL']}/bucket"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/_kill":
            self.victim = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start("200 OK", [("Content-Length", "0")])
            return [b""]
        self.requests.append((method, path))
        self.victim["came"] = self.victim.get("came", 0) + 1
        if self.victim["came"] == self.victim.get("at"):
            os.kill(self.victim["pid"], signal.SIGKILL)
            return self.drop(environ)
        fault = self.fault(method, path)
        if callable(fault):
            fault()
        elif fault == "reset":
            return self.drop(environ)
        elif fault is not None:
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            start(f"{fault} no", [("Content-Length", "0")])
            return [b""]
        return self.app(environ, start)

    @staticmethod
    def drop(environ: dict[str, Any]) -> Any:
        environ["wsgi.input"] = io.BytesIO()
        environ["werkzeug.socket"].shutdown(2)
        raise ConnectionAbortedError
