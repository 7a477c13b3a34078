"""maekit push and hub: sources, against a stand-in on this machine for the few calls that huggingface_hub makes.

The client is the real one; nothing here leaves the loopback interface.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import save_file

from maekit import cli
from maekit.config import UserError
from maekit.weights import hub
from maekit.weights.store import load, random_model

huggingface_hub: Any = pytest.importorskip("huggingface_hub")

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


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which the client takes for the real one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Hub()
    found.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.hub = found  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # the hub's other way of large files
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield found
    server.shutdown()
    server.server_close()


def make_run(folder: Path, **changes: Any) -> Path:
    """A run's folder with weights and a probe's card."""
    model = random_model(tiny_config(img_size=(8,)))
    for name, value in {"data": "digits", "epochs": 12.0, "steps": 345, "recipe": "digits", **changes}.items():
        setattr(model.passport, name, value)
    run = folder / "run"
    (run / "probe-digits").mkdir(parents=True)
    save_file(model.state_dict(), run / "model.safetensors", metadata=model.passport.to_metadata())
    scores = [{"source": "/home/me/secret/run", "pooling": "mean", "linear": 0.912, "knn": 0.834}]
    card = {"data": "digits", "training_images": 1437, "test_images": 360, "scores": scores}
    (run / "probe-digits" / "card.json").write_text(json.dumps(card))
    (run / "config.json").write_text('{"data": "/home/me/secret"}')
    return run


def test_what_is_pushed_comes_back(tmp_path: Path, stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert cli.main(["push", str(run), "me/mae-digits", "--private", "--license", "apache-2.0"]) == 0
    assert f"uploaded: {stand_in.address}/me/mae-digits/commit/" in capsys.readouterr().out
    held = stand_in.files["me/mae-digits"]
    assert held.keys() == {"model.safetensors", "README.md"}
    assert stand_in.private == {"me/mae-digits"}
    assert len(stand_in.commits) == 1, "both files in one commit"
    assert any(line.startswith("PUT ") for line in stand_in.asked), "weights go as a large object"
    card = held["README.md"].decode()
    for word in ("license: apache-2.0", "12 epochs (345 steps) on digits", 'maekit.load("hub:me/mae-digits")',
                 "| run | mean | 91.2 | 83.4 |", "1,437 training and 360 test images"):  # fmt: skip
        assert word in card
    assert "secret" not in card
    assert "home" not in card

    folder = hub.fetch("hub:me/mae-digits")
    found, sent = load(folder), load(run)
    assert all(torch.equal(value, sent.state_dict()[name]) for name, value in found.state_dict().items())
    assert found.passport.weights_license == "apache-2.0"
    assert found.passport.data == "digits"


def test_files_that_explain_weights_come_along(stand_in: Hub) -> None:
    stand_in.files["them/vit"] = {"model.safetensors": b"w", "config.json": b"{}", "run.py": b"evil()", "a.bin": b"x"}
    folder = hub.fetch("them/vit")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert hub.fetch(f"them/vit@{folder.name}") == folder


def test_the_cache_serves_without_a_hub(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.files["them/vit"] = {"model.safetensors": b"w"}
    folder = hub.fetch("them/vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("them/vit") == folder
    with pytest.raises(UserError, match="cannot be reached, and the cache does not hold"):
        hub.fetch("them/other")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("them/nothing", "no such repository, or a private one"),
        ("them/vit@v9", "no such revision"),
        ("them/empty", "there is no model.safetensors or pytorch_model.bin in it"),
        ("a/b/c", "no name of a repository"),
        ("", "no name of a repository"),
    ],
)
def test_what_cannot_be_fetched_is_said(stand_in: Hub, name: str, word: str) -> None:
    stand_in.files |= {"them/vit": {"model.safetensors": b"w"}, "them/empty": {"README.md": b""}}
    with pytest.raises(UserError, match=word):
        hub.fetch(name)


def test_nothing_is_uploaded_by_a_dry_run(tmp_path: Path, stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(make_run(tmp_path)), "me/mae", "--dry-run"]) == 0
    assert "license: unknown" in capsys.readouterr().out
    assert not stand_in.asked


def test_a_licence_stays(tmp_path: Path, stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, weights_license="CC-BY-NC-4.0")
    assert cli.main(["push", str(run), "me/mae", "--license", "mit"]) == 2
    assert "another one already (CC-BY-NC-4.0)" in capsys.readouterr().err
    assert not stand_in.asked


def test_who_may_not_write_is_told(
    tmp_path: Path, stand_in: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    run = make_run(tmp_path)
    assert cli.main(["push", str(run), "me/mae"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert cli.main(["push", str(run), "me/mae"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    for words, word in ((["random:vit_tiny_patch16_224", "me/mae"], "only files can be pushed"),
                        ([str(run), "mae"], "write owner/name"), ([str(run)], "a name on the hub")):  # fmt: skip
        assert cli.main(["push", *words]) == 2
        assert word in capsys.readouterr().err
