"""A server of this machine that answers as the Hugging Face hub does: the real huggingface_hub talks to it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

COMMIT = "0123456789012345678901234567890123456789"


class Hub(http.server.ThreadingHTTPServer):
    """files: what is served, by the path of its address; any other path is 404. asked: the paths, in their order.

    private: of each repository that was made, whether it is. uploaded: the files of the last commit, by name.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}
        self.uploaded: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.give_file(with_body=False)

    def do_GET(self) -> None:
        self.give_file(with_body=True)

    def do_POST(self) -> None:
        """A repository is made, asked how it takes files, and given them as one commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            self.server.private[name] = made["visibility"] == "private"
            answer = {"url": f"{self.server.address}/{name}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            lines = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            self.server.uploaded = {line["path"]: base64.b64decode(line["content"]) for line in lines}
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.server.address}/{repository}/commit/{COMMIT}"
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": url}
        self.respond(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def give_file(self, with_body: bool) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.respond(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.respond(200, content, headers, with_body)

    def respond(self, status: int, content: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
