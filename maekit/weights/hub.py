"""Weights from and to the Hugging Face hub, through its own client (the [hub] extra).

The client's settings hold: HF_ENDPOINT, HF_HOME, HF_TOKEN or `hf auth login`, HF_HUB_OFFLINE.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from maekit.hub import PREFIX, client, endpoint, explained, offline_at_once

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
    errors = client().errors
    repo, _, revision = name.removeprefix(PREFIX).partition("@")

    def download(file: str, revision: str | None) -> Path:
        return Path(client().hf_hub_download(repo, file, revision=revision, endpoint=endpoint()))

    with offline_at_once(), explained(f"{PREFIX}{repo}", f"{' or '.join(WEIGHTS_FILES)} in it"):
        try:
            folder = download(WEIGHTS_FILES[0], revision or None).parent
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:  # the hub has answered: there is no such file
            folder = download(WEIGHTS_FILES[1], revision or None).parent
        for file in BESIDE:
            with suppress(errors.EntryNotFoundError):
                download(file, folder.name)  # of the same commit
    return folder


def upload(name: str, files: dict[str, Path | bytes], *, private: bool, message: str) -> str:
    """Make the repository where it is missing and put files into it as one commit; the commit's address.

    Raises:
        UserError: no such owner, no right to write there, or no connection.
    """
    api = client().HfApi(endpoint=endpoint())
    with explained(name, "it"):
        api.create_repo(name, private=private, exist_ok=True)
        operations = [
            client().CommitOperationAdd(path, value if isinstance(value, bytes) else str(value))
            for path, value in files.items()
        ]
        return str(api.create_commit(name, operations, commit_message=message).commit_url)
