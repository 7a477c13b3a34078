"""Named, complete configs. Each file opens with its command, cost, expected number and the source of its values.

A recipe is a Python value, `CONFIG`; its name is its file's, with dashes. `maekit recipes` prints the headers, so that
what is listed is what the files say.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re

from maekit.config import PretrainConfig, UserError, did_you_mean

_NAMES = "Command|Cost|Expected|Source|Deviations"
_FIELD = re.compile(rf"^({_NAMES}): (.*?)(?=^(?:{_NAMES}): |\Z)", re.MULTILINE | re.DOTALL)


def names() -> list[str]:
    """All recipes, by name."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def get(name: str) -> PretrainConfig:
    """The config of a recipe.

    Raises:
        UserError: no such recipe; names the nearest ones.
    """
    if name not in names():
        hint = did_you_mean(name, names())
        if os.path.isdir(name):
            hint = f"a folder; maekit resume {name} continues a run, --init {name} begins with its weights"
        raise UserError(f"recipe {name!r}: no such recipe; {hint}")
    config: PretrainConfig = importlib.import_module(f"maekit.recipes.{name.replace('-', '_')}").CONFIG
    assert config.recipe == name, (config.recipe, name)
    return config


def header(name: str) -> dict[str, str]:
    """What a recipe's file says of itself: "what", "command", "cost", "expected", "source", and "deviations" if any."""
    text = importlib.import_module(f"maekit.recipes.{name.replace('-', '_')}").__doc__ or ""
    what, _, rest = text.partition("\n\n")
    fields = {"what": " ".join(what.split())}
    for found in re.finditer(_FIELD, rest):
        fields[found.group(1).lower()] = " ".join(found.group(2).split())
    return fields
