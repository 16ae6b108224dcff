"""A Hub on this machine: the endpoints that an upload uses, with faults to order.

Speaks what `huggingface_hub` asks for: make a model, look at it, check a card, ask how to send
files, send them by LFS or to a Xet store, commit.
"""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Request"], bool]
"""Is asked of each request; True: it has answered, or has dropped the connection."""
TOKEN = "hf_" + "x" * 34


class Hub:
    """What the server knows, and what it was asked."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        """In the only model, by path: of large files what was committed of them."""
        self.large: dict[str, bytes] = {}
        """By SHA-256."""
        self.committed: dict[str, str] = {}
        """SHA-256 of large files, by path."""
        self.xorbs: dict[str, bytes] = {}
        """Of the Xet store, by hash: chunks of files."""
        self.commits = 0
        self.asked: list[str] = []
        self.sent: Counter[str] = Counter()
        """How often each large file, or each xorb, arrived whole."""
        self.faults: list[Fault] = []
        self.url = ""
        self.token = TOKEN
        self.lock = threading.Lock()

    def once(self, where: str, fault: "Callable[[Request], None]", times: int = 1) -> None:
        """The next requests to `where` (method, and a part of the path) get a fault."""
        method, _, part = where.partition(" ")
        left = [times]

        def asked(request: "Request") -> bool:
            with self.lock:
                if request.command != method or part not in request.path or not left[0]:
                    return False
                left[0] -= 1
            fault(request)
            return True

        self.faults.append(asked)


class Request(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drop(self) -> None:
        """End the connection without an answer."""
        self.close_connection = True
        self.connection.close()

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self._read())

    def do_PUT(self) -> None:
        self.hub.asked.append(f"PUT {self.path}")
        if any(fault(self) for fault in self.hub.faults):
            if not self.close_connection:
                self._read()  # or it would be taken for the next request
            return
        self._put(self._read())

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _serve(self, data: bytes) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if any(fault(self) for fault in hub.faults):
            return
        if path.startswith("/cas/"):
            self._store(path, data)
        elif self.headers.get("Authorization") != f"Bearer {hub.token}":
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self.answer(401, {"error": "Invalid credentials"}, **headers)
        else:
            self._admitted(path, data)

    def _admitted(self, path: str, data: bytes) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(data))
        elif "/xet-write-token/" in path:
            self._admit()
        elif path == "/verify":
            asked = json.loads(data)
            self.answer(200 if asked["oid"] in self.hub.large else 404)
        elif "/preupload/" in path:
            self._preupload(json.loads(data))
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in data.splitlines()])
        elif path.startswith("/api/models/"):
            self._info("/".join(path.split("/")[3:5]))
        else:
            self.answer(404)

    def _admit(self) -> None:
        """Where the Xet store is, and a token for it."""
        until = int(time.time()) + 3600
        cas = f"{self.hub.url}/cas"
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "t"}
        headers["X-Xet-Token-Expiration"] = str(until)
        self.answer(200, {"casUrl": cas, "accessToken": "t", "exp": until}, **headers)

    def _store(self, path: str, data: bytes) -> None:
        """The Xet store: xorbs and shards are taken, newer ways to send them are not known."""
        if path.startswith("/cas/v1/xorbs/"):
            name = path.rpartition("/")[2]
            with self.hub.lock:
                new = name not in self.hub.xorbs
                self.hub.xorbs[name] = data
                self.hub.sent[name] += 1
            self.answer(200, {"was_inserted": new})
        elif path == "/cas/v1/shards":
            self.answer(200, {"result": 1})
        else:
            self.answer(404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        body = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.private:
            self.answer(409, {**body, "error": "You already created this model repo"})
            return
        self.hub.private[name] = asked.get("visibility") == "private"
        self.answer(200, body)

    def _info(self, name: str) -> None:
        if name not in self.hub.private:
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        files = [{"rfilename": file} for file in {**self.hub.files, **self.hub.committed}]
        self.answer(
            200,
            {"id": name, "sha": f"{self.hub.commits:040x}", "siblings": files,
             "private": self.hub.private[name], "tags": [], "downloads": 0, "likes": 0},
        )  # fmt: skip

    def _preupload(self, asked: dict[str, Any]) -> None:
        answers = []
        for file in asked["files"]:
            path = file["path"]
            large = path.endswith(".safetensors")
            known = self.hub.committed.get(path) if large else None
            if path in self.hub.files:
                content = self.hub.files[path]
                known = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.answer(200, {"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            oid, found = wanted["oid"], {"oid": wanted["oid"], "size": wanted["size"]}
            if oid not in self.hub.large:
                upload = {"href": f"{self.hub.url}/large/{oid}?signature=secret-{oid[:8]}"}
                found["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(found)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, data: bytes) -> None:
        oid = self.path.partition("?")[0].rpartition("/")[2]
        whole = hashlib.sha256(data).hexdigest() == oid
        with self.hub.lock:
            if whole:
                self.hub.large[oid] = data
                self.hub.sent[oid] += 1
        self.answer(200 if whole else 400)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large and not self.hub.xorbs:
                    self.answer(400, {"error": "no such object"})
                    return
                self.hub.committed[value["path"]] = value["oid"]
        self.hub.commits += 1
        oid = f"{self.hub.commits:040x}"
        self.answer(200, {"commitUrl": f"{self.hub.url}/u/n/commit/{oid}", "commitOid": oid})


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that listens on this machine until the block ends."""
    hub = Hub()
    handler = type("Handler", (Request,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
