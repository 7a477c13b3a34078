"""A stand-in on this machine for the calls that huggingface_hub makes of the Hugging Face hub.

The client is the real one; nothing here leaves the loopback interface.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_of_the_test"


class Hub:
    """What the stand-in holds: repositories with files, large objects, and the requests that came."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.address = ""
        self.refs: dict[str, dict[str, str]] = {}
        """Data sets: repository -> branch -> commit."""
        self.trees: dict[str, dict[str, dict[str, bytes]]] = {}
        """Repository -> commit -> files."""
        self.gated: set[str] = set()
        self.page = 3
        """Entries on a page of a list of files."""
        self.held: set[str] = set()
        """Files of which half is sent, which `half_sent` says, and the rest when `go_on` is set."""
        self.go_on, self.half_sent = threading.Event(), threading.Event()

    def push(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Make `files` all that a branch of a data set holds; the commit."""
        commit = hashlib.sha1(repr((repo, ref, sorted(files.items()))).encode()).hexdigest()
        self.refs.setdefault(repo, {})[ref] = commit
        self.trees.setdefault(repo, {})[commit] = dict(files)
        return commit

    def downloads(self) -> list[str]:
        """The files of data sets that were asked for and sent, but for the README."""
        return sorted(
            line.removeprefix("GET ") for line in self.asked if line.startswith("GET ") and "README" not in line
        )

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()

    def post(self, path: str, body: bytes) -> Any:
        """The answer to a POST as a JSON value."""
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    {**one, "actions": {"upload": {"href": f"{self.address}/put/{one['oid']}"}}} for one in wanted
                ],
            }
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo not in self.files:
                self.files[repo] = {}
                self.private |= {repo} if asked.get("private") or asked.get("visibility") == "private" else set()
            return {"url": f"{self.address}/{repo}"}
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": one["path"], "shouldIgnore": False} for one in json.loads(body)["files"]]
            for one in files:
                one["uploadMode"] = "lfs" if one["path"].endswith(".safetensors") else "regular"
            return {"files": files}
        assert "/commit/" in path, path
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append(value)
            elif entry["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                self.files[repo][value["path"]] = self.objects[value["oid"]]
        oid = self.commit(repo)
        return {"success": True, "commitUrl": f"{self.address}/{repo}/commit/{oid}", "commitOid": oid}


class Handler(BaseHTTPRequestHandler):
    """HTTP over a Hub, which hangs on the server."""

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        self.hub.asked.append(f"POST {path}")
        if not self.allowed():
            self.answer(401, b'{"error": "Invalid credentials"}')
            return
        self.answer(200, json.dumps(self.hub.post(path, body)).encode(), Content_Type="application/json")

    def do_PUT(self) -> None:
        data = self.body()
        oid = self.path.rsplit("/", 1)[1]
        self.hub.asked.append(f"PUT {oid}")
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.answer(200)

    def do_GET(self) -> None:
        """/owner/name/resolve/revision/file"""
        if self.path.startswith(("/api/datasets/", "/datasets/")):
            self.data_set()
            return
        if self.path.startswith("/api/"):  # whether a repository is there that may not be made
            self.answer(401 if not self.allowed() else 404)
            return
        owner, name, verb, revision, file = urlsplit(self.path).path[1:].split("/", 4)
        repo = f"{owner}/{name}"
        self.hub.asked.append(f"{self.command} {file}")
        if verb != "resolve" or repo not in self.hub.files or (repo in self.hub.private and not self.allowed()):
            self.answer(404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", self.hub.commit(repo)):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif file not in self.hub.files[repo]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.commit(repo))
        else:
            data = self.hub.files[repo][file]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(200, data, ETag=etag, X_Repo_Commit=self.hub.commit(repo))

    do_HEAD = do_GET

    def data_set(self) -> None:
        """/api/datasets/owner/name[/revision/R | /tree/R], and /datasets/owner/name/resolve/R/file, in quoted names."""
        address = urlsplit(self.path)
        pieces = [unquote(piece) for piece in address.path.removeprefix("/api").split("/")[2:]]
        repo, verb, revision = "/".join(pieces[:2]), (pieces[2:3] or ["revision"])[0], (pieces[3:4] or ["main"])[0]
        file = "/".join(pieces[4:])
        self.hub.asked.append(f"{self.command} {file}" if verb == "resolve" else f"api {verb} {revision}")
        if repo not in self.hub.refs or (repo in self.hub.private and not self.allowed()):
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        commit = self.hub.refs[repo].get(revision, revision)
        files = self.hub.trees[repo].get(commit)
        if files is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif verb == "revision":
            found = {"id": repo, "sha": commit, "private": False, "gated": repo in self.hub.gated, "tags": []}
            found["siblings"] = [{"rfilename": path} for path in sorted(files)]
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        elif verb == "tree":
            self.list_page(files, int(parse_qs(address.query).get("cursor", ["0"])[0]))
        elif repo in self.hub.gated:
            self.answer(403, X_Error_Code="GatedRepo")
        elif file not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            self.send_file(file, files[file], commit)

    def list_page(self, files: dict[str, bytes], first: int) -> None:
        """One page of the list of files, with the folders among them, and the address of the next."""
        folders = {path.rpartition("/")[0] for path in files if "/" in path}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": one, "oid": "0" * 40, "size": 0} for one in folders
        ]
        for path, data in files.items():
            entries.append({"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)})
        entries.sort(key=lambda entry: str(entry["path"]))
        last = first + self.hub.page
        more = {}
        if last < len(entries):
            path = urlsplit(self.path).path
            more["Link"] = f'<{self.hub.address}{path}?recursive=true&cursor={last}>; rel="next"'
        self.answer(200, json.dumps(entries[first:last]).encode(), Content_Type="application/json", **more)

    def send_file(self, name: str, data: bytes, commit: str) -> None:
        """A file, or the rest of it that was asked for."""
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if first:
            headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.command == "HEAD" or name not in self.hub.held:
            self.answer(206 if first else 200, data[first:], **headers)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.hub.half_sent.set()
        self.hub.go_on.wait(30)
        with contextlib.suppress(OSError):
            self.wfile.write(data[len(data) // 2 :])


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which the client takes for the real one; its cache is empty."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Hub()
    found.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.hub = found  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MAEKIT_CACHE", str(tmp_path / "lists"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # for a process of its own
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # the hub's other way of large files
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield found
    found.go_on.set()
    server.shutdown()
    server.server_close()
