"""The columns of Parquet or a table that a user named."""

from __future__ import annotations

from dataclasses import dataclass

from maekit.config import UserError


@dataclass(frozen=True)
class Columns:
    """Names of columns, as --image-column, --label-column and --group-by give them; None: the usual ones."""

    image: str | None = None
    label: str | None = None
    group: str | None = None
    """Without a usual one. Where no column has this name, it is a pattern of paths (groups.py)."""

    def refuse(self, spec: str) -> None:
        """For data that have no columns.

        Raises:
            UserError: one was named that can be nothing else.
        """
        asked = {"--image-column": self.image, "--label-column": self.label}
        given = [flag for flag, value in asked.items() if value is not None]
        if given:
            raise UserError(f"{' and '.join(given)}: only for Parquet and tables, which --data {spec} is not")
