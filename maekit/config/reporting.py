"""A page about runs: what is shown of them, and where it is written."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_MB = 0.5
"""Words, tables and curves of one run take less than this; pictures get the rest."""


@dataclass(kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page about runs of pretraining, fine-tuning or segmentation, or about a card.

    Nothing is measured, and nothing in a run's folder is changed but for the page itself. The page loads nothing from
    anywhere; it can be read while the run trains, and says so.
    """

    out: str | None = None
    """File to write. Default: report.html in the run's folder; of several runs here. An earlier page that says
    something else is kept as report-1.html, report-2.html, ..."""
    max_mb: float = 5.0
    """Largest size of the page in MB (millions of bytes): beyond it, fewer panels and smaller pictures are shown, which
    the page says. At least 0.5."""
    panels: int = 24
    """Panels of reconstructions, at most, that the slider goes through, of each run: evenly spaced, the last among
    them. 0: none."""
    open: bool = False
    """Show the page in the browser when it is written."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values, each naming the value, the rule and the flag."""
        found = []
        if not self.max_mb >= SMALLEST_MB:
            found.append(f"--max-mb {self.max_mb:g}: must be at least {SMALLEST_MB:g}")
        if self.panels < 0:
            found.append(f"--panels {self.panels}: must not be negative")
        if self.out is not None and not self.out.lower().endswith((".html", ".htm")):
            found.append(f"--out {self.out}: name a file that ends in .html")
        return found
