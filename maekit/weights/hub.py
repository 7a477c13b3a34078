"""Weights from and to the Hugging Face hub, through its own client (the [hub] extra).

The client's settings hold: HF_ENDPOINT, HF_HOME, HF_TOKEN or `hf auth login`, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maekit.config import UserError

PREFIX = "hub:"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weights on the hub, the first that is there; the second is only ever read as weights alone."""
BESIDE = ("config.json", "preprocessor_config.json")
"""Where they are, they say what foreign weights are."""


def fetch(name: str) -> Path:
    """The folder, in the hub's cache, with the weights of `owner/name` or `owner/name@revision`.

    `hub:` may stand before it. Only the weights and two JSON files that may explain them are downloaded. Without a
    connection, what the cache holds is taken.

    Raises:
        UserError: no such repository, revision or weights, no right to read it, or no connection.
    """
    client = _client()
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    endpoint = os.environ.get("HF_ENDPOINT")

    def download(file: str, revision: str | None) -> Path:
        return Path(client.hf_hub_download(repo, file, revision=revision, endpoint=endpoint))

    with offline_at_once(), _explained(f"{PREFIX}{repo}", f"{' or '.join(WEIGHTS_FILES)} in it"):
        try:
            folder = download(WEIGHTS_FILES[0], revision or None).parent
        except client.errors.LocalEntryNotFoundError:
            raise
        except client.errors.EntryNotFoundError:  # the hub has answered: there is no such file
            folder = download(WEIGHTS_FILES[1], revision or None).parent
        for file in BESIDE:
            with suppress(client.errors.EntryNotFoundError):
                download(file, folder.name)  # of the same commit
    return folder


@contextmanager
def offline_at_once() -> Iterator[None]:
    """Without a network the hub's client tries for a minute before it looks into its cache; this tells it at once."""
    constants: Any = _client().constants
    before = constants.HF_HUB_OFFLINE
    proxied = any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    try:
        if not (before or proxied):
            host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
            try:
                socket.getaddrinfo(host.hostname, host.port or 443)
            except OSError:
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def upload(name: str, files: dict[str, Path | bytes], *, private: bool, message: str) -> str:
    """Make the repository where it is missing and put files into it as one commit; the commit's address.

    Raises:
        UserError: no such owner, no right to write there, or no connection.
    """
    client = _client()
    api = client.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _explained(name, "it"):
        api.create_repo(name, private=private, exist_ok=True)
        operations = [
            client.CommitOperationAdd(path, value if isinstance(value, bytes) else str(value))
            for path, value in files.items()
        ]
        return str(api.create_commit(name, operations, commit_message=message).commit_url)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'maekit[hub]'") from None
    return huggingface_hub


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """The client's errors as ones that say what to do."""
    errors = _client().errors
    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"{name}: no name of a repository; write owner/name") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such repository, or a private one: hf auth login, or HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: no such revision") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(f"{name}: the hub cannot be reached, and the cache does not hold {what}") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{name}: there is no {what}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = ": hf auth login, or HF_TOKEN with the right to write" if status in (401, 403) else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: the hub refuses, status {status}{hint} ({reason})") from None
    except OSError as error:
        raise UserError(f"{name}: the hub cannot be reached ({' '.join(str(error).split())[:200]})") from None
    except Exception as error:
        # The client's own client has changed from release to release (requests, httpx), and its errors with it.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(f"{name}: the hub cannot be reached ({' '.join(str(error).split())[:200]})") from None
