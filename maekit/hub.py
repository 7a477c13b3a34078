"""The Hugging Face hub through its own client (the [hub] extra): what weights and data sets share.

The client's settings hold: HF_ENDPOINT, HF_HOME, HF_TOKEN or `hf auth login`, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import os
import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maekit.config import UserError

PREFIX = "hub:"


def client() -> Any:
    """huggingface_hub, with its modules of settings and errors, which it loads only where somebody else has.

    Raises:
        UserError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.repocard
        import huggingface_hub.utils
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'maekit[hub]'") from None
    return huggingface_hub


def endpoint() -> str | None:
    """The address of the hub, where it is not the usual one."""
    return os.environ.get("HF_ENDPOINT")


@contextmanager
def offline_at_once() -> Iterator[None]:
    """Without a network the hub's client tries for a minute before it looks into its cache; this tells it at once."""
    constants: Any = client().constants
    before = constants.HF_HUB_OFFLINE
    proxied = any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    try:
        if not (before or proxied):
            host = urllib.parse.urlsplit(endpoint() or constants.ENDPOINT)
            try:
                socket.getaddrinfo(host.hostname, host.port or 443)
            except OSError:
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cannot_be_reached(error: BaseException) -> bool:
    """Whether an error of the client's says that there is no way to the hub, or that it must not look for one."""
    if isinstance(error, client().errors.HfHubHTTPError):
        return False
    # The client's own client has changed from release to release (requests, httpx), and its errors with it.
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests"))


@contextmanager
def explained(name: str, what: str, kind: str = "repository") -> Iterator[None]:
    """The client's errors as ones that say what to do. `what` was looked for in the repository `name`."""
    errors = client().errors
    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"{name}: no name of a repository; write owner/name") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: is open only to those who have accepted its conditions, on its page on the hub; then "
            "hf auth login, or HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such {kind}, or a private one: hf auth login, or HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: no such revision") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(f"{name}: the hub cannot be reached, and the cache does not hold {what}") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{name}: there is no {what}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = ": hf auth login, or HF_TOKEN with the right to do this" if status in (401, 403) else ""
        raise UserError(f"{name}: the hub refuses, status {status}{hint} ({_reason(error)})") from None
    except Exception as error:
        if _disk_is_full(error):
            place = client().constants.HF_HUB_CACHE
            raise UserError(
                f"{name}: the disk of the hub's cache is full ({place}); HF_HOME names another place"
            ) from None
        if isinstance(error, PermissionError):
            raise UserError(
                f"{name}: the hub's cache cannot be used ({_reason(error)}); HF_HOME names another"
            ) from None
        if not cannot_be_reached(error):
            raise
        raise UserError(f"{name}: the hub cannot be reached ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _disk_is_full(error: BaseException | None) -> bool:
    """Also where the client, or its part that is not Python, has wrapped what the system said."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
