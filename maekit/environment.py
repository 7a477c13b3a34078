"""What env.json holds: versions, hardware, commit and command of a run.

torch is imported inside the functions, so that the package can say its version without it.
"""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def own_version() -> str:
    """maekit's version; where the sources are imported from a folder that pip knows nothing of, that."""
    try:
        return metadata.version("maekit")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def package_versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    names = (
        "torch",
        "timm",
        "torchvision",
        "accelerate",
        "numpy",
        "pillow",
        "simplejpeg",
        "safetensors",
        "scikit-learn",
    )
    return {"maekit": own_version()} | {name: metadata.version(name) for name in names}


@functools.cache
def _commit() -> str | None:
    """The commit of maekit's own checkout, where it runs from one.

    An environment inside a project of the user's holds a package, and the commit there is that project's.
    """
    try:
        here = Path(__file__).parent
        asked = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "--short", "HEAD"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5)
        root, commit = answer.stdout.splitlines()
        return commit if answer.returncode == 0 and Path(root).samefile(here.parent) else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """What env.json holds: versions, hardware, commit and command."""
    import torch

    program = Path(sys.argv[0]).name
    return {
        "command": ["maekit" if program == "__main__.py" else program, *sys.argv[1:]],  # python -m maekit
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor()
