"""What a run would cost, before it is started."""

from __future__ import annotations

from dataclasses import dataclass

from maekit.config.base import flag
from maekit.config.pretraining import PretrainConfig


@dataclass(kw_only=True)
class PlanConfig(PretrainConfig):
    """A dry run of a recipe on this machine: speed, memory, the batch that fits, the time that the whole run takes."""

    images: int | None = None
    """Plan for so many images instead of --data: steps are timed on noise, and loading is not timed."""
    processes: int | None = None
    """Processes (one a GPU) that the run will have; the plan itself runs in one and takes it that all are as quick."""
    out: str = ""
    """JSON file for the plan. Default: none is written."""
    dry_steps: int = 20
    """Steps that are timed, after those that find a batch of a suitable size."""
    dry_seconds: float = 20.0
    """Fewer steps are timed, but at least two, where they take longer than this together."""

    def problems(self) -> list[str]:
        """What is wrong with the recipe's values, with --data or --images, and with the dry run's own values."""
        found = [line for line in super().problems() if not line.startswith("--data is missing")]
        if not self.data and self.images is None:
            found.append("give --data, or --images with the number of images that there will be")
        if self.data and self.images is not None:
            found.append(f"--data {self.data} --images {self.images}: give one of them; --data counts its own")
        found += [
            f"--{flag(name)} {value:g}: must be above 0"
            for name in ("images", "dry_steps", "dry_seconds")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        world = self.processes or 1
        chosen = "batch_size" in self.follow_images  # one that they can share
        if world > 1 and self.accum > 0 and self.batch_size % (world * self.accum) and not chosen:
            found.append(
                f"--batch-size {self.batch_size} is not divisible by --processes {world} x --accum {self.accum}: it "
                "counts the images of one optimiser step over all of them"
            )
        return found
