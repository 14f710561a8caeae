"""A hub on this machine that serves one folder, and fails as it is told to."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class SmallHub(ThreadingHTTPServer):
    """`troubles` are what the next requests that fit the pattern `aimed_at` are met with, one each.

    `always` is what all others of these are met with.

    A trouble is a status, with headers, or `torn` (the body stops half way), or `silent` (no answer).
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.troubles: list[tuple] = []
        self.always: tuple | None = None
        self.aimed_at = "/org/"
        self.seen: list[str] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: SmallHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        torn = False
        if re.search(self.server.aimed_at, self.requestline) and (self.server.troubles or self.server.always):
            trouble, *headers = self.server.troubles.pop(0) if self.server.troubles else self.server.always or ()
            if trouble == "silent":
                self.server.closing.wait(5)
                return None
            if trouble != "torn":
                return self._answer(trouble, b"", dict(*headers))
            torn = True
        path = self.path.partition("?")[0].strip("/").removeprefix("api/models/").removeprefix("datasets/").split("/")
        files = [file for file in sorted(self.server.folder.iterdir()) if file.is_file()]
        match path[2:]:
            case ["resolve", _, name]:
                file = self.server.folder / name
                if not file.is_file():
                    return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                body = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                return self._answer(200, body, headers, torn)
            case ["tree", *_]:
                listed = [
                    {
                        "type": "file",
                        "path": f.name,
                        "size": f.stat().st_size,
                        "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                    }
                    for f in files
                ]
            case _:
                listed = {"id": "/".join(path[:2]), "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
        return self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], torn: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if torn else body)
        self.close_connection = self.close_connection or torn

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[SmallHub]:
    hub = SmallHub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
