"""A run on local data talks to nobody: no connection, no listener, no name looked up."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from test_corpus import in_child
from test_untrusted import RUN

from maekit import cli
from maekit.models.mae import MaskedAutoencoder

PROMISE = "no connection and no listener"

pytestmark = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's tables of sockets")


def internet_sockets() -> list[str]:
    """This process's open sockets of the internet families, as the kernel lists them."""
    own = set()
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            own.add(os.readlink(f"/proc/self/fd/{handle}").removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                if line.split()[9] in own:
                    found.append(f"{table} {line.split()[1]}")
    return found


def watch_network(work: Any) -> tuple[list[str], list[str]]:
    """What Python's audit events and the kernel's tables saw of the internet during `work`, and of a control after it.

    An audit hook cannot be removed: this belongs in a process that ends soon.
    """
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.__new__":
            if arguments[1] in (socket.AF_INET, socket.AF_INET6):
                seen.append(f"{event} {arguments[1:]}")
        elif event in ("socket.bind", "socket.connect", "socket.sendto"):
            if arguments[0].family in (socket.AF_INET, socket.AF_INET6):
                seen.append(f"{event} {arguments[1:]}")
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
            seen.append(f"{event} {arguments}")

    draw = MaskedAutoencoder.draw_masks

    def drawn(self: MaskedAutoencoder, *given: Any, **key: Any) -> Any:
        seen.extend(internet_sockets())  # sockets of C++ raise no audit event
        return draw(self, *given, **key)

    strangers = internet_sockets()
    sys.addaudithook(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedAutoencoder, "draw_masks", drawn)
        work()
    seen.extend(internet_sockets())
    during = [one for one in seen if one not in strangers]
    seen.clear()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as control:
        control.bind(("127.0.0.1", 0))
        control.listen()
        seen.extend(internet_sockets())
    return during, seen


def test_pretrain_and_probe_on_local_data_make_no_connection(tmp_path: Path) -> None:
    """No socket of AF_INET or AF_INET6 is made, no name looked up; and the watch would have seen one."""

    def work() -> None:
        out = str(tmp_path / "run")
        assert cli.main([*RUN, "--probe-every", "1", "--out", out]) == 0
        assert cli.main(["probe", out, "--data", "digits", "--device", "cpu", "--no-baselines"]) == 0

    during, control = in_child(lambda: watch_network(work), tmp_path / "seen.pickle")
    assert during == []
    assert len({line.split()[0] for line in control}) >= 3, control  # made, bound, and in the kernel's table
