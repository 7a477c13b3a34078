"""Help of flags as running text, wrapped by the terminal's width and not as the source happens to be.

tyro takes it from the docstrings under a config's fields, and keeps their line breaks from the third line on: these
lines are indented, which it takes for a list. What a class's own docstring says under "Attributes" goes before them.
"""

from __future__ import annotations

import dataclasses


def unwrap_docstrings(config: type) -> None:
    """Repeat the docstrings of a config's fields in its class's, and in those it is derived from, each on one line."""
    import docstring_parser  # tyro's own reader of them

    for owner in config.__mro__:
        if dataclasses.is_dataclass(owner) and "Attributes:" not in (owner.__doc__ or ""):
            fields = {one.arg_name: one.description for one in docstring_parser.parse_from_object(owner).params}
            lines = [f"    {name}: {' '.join(text.split())}" for name, text in fields.items() if text]
            owner.__doc__ = "\n".join([f"{owner.__doc__ or ''}\n", "Attributes:", *lines])
