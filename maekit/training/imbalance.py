"""What classes of different sizes make of an accuracy: what one answer for all images reaches, what each class reaches
by itself, and images of classes that nothing was trained on.

Shapes: S images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

Ints = npt.NDArray[np.int64]
UNEVEN = 1.5
"""From so many times the part that it had among equal ones on, the largest class makes the accuracy of all images say
too little: then that of the classes stands beside it."""
NAMED = 5
"""Classes that a message names."""


@dataclass(frozen=True)
class TestClasses:
    """The test images by their classes, beside what there is to learn from."""

    images_C: Ints
    """Test images of each class."""
    unseen_C: npt.NDArray[np.bool_] | None
    """[C] True for a class with test images and no training image; None where it is not known what was trained on."""
    names: Sequence[str]

    @classmethod
    def of(cls, train_S: Ints | None, test_S: Ints, names: Sequence[str]) -> TestClasses:
        """From the class ids of the images that are trained on, where they are known, and of those that are scored."""
        test_C = np.bincount(test_S, minlength=len(names))
        train_C = None if train_S is None else np.bincount(train_S, minlength=len(names))
        return cls(test_C, None if train_C is None else (test_C > 0) & (train_C == 0), names)

    @property
    def largest_share(self) -> float:
        """The most that one answer for all test images can reach, in 0..1."""
        return float(self.images_C.max() / self.images_C.sum())

    @property
    def unseen_images(self) -> int:
        """Test images of classes without a training image."""
        return 0 if self.unseen_C is None else int(self.images_C[self.unseen_C].sum())

    @property
    def is_uneven(self) -> bool:
        """Whether the largest class has much more than its part of the test images."""
        return self.largest_share >= UNEVEN / int((self.images_C > 0).sum())

    def largest_said(self, images: str = "the test images") -> str:
        """What one answer reaches, in words."""
        name = self.names[int(self.images_C.argmax())]
        return f"always answering {name} would be right for {100 * self.largest_share:.1f} % of {images}"

    def remarks(self) -> list[str]:
        """That nothing can be right for some of the images, in a line; none where that is not so."""
        if self.unseen_C is None or not self.unseen_images:
            return []
        found = [self.names[int(k)] for k in np.flatnonzero(self.unseen_C)]
        shown = ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
        count = int(self.images_C.sum())
        return [
            f"{self.unseen_images:,} of {count:,} test images are of classes that no training image has ({shown}): no "
            f"more than {100 * (1 - self.unseen_images / count):.1f} % can be right"
        ]

    def warn(self, console: Console) -> None:
        """Print the remarks."""
        for line in self.remarks():
            console.print(line, style="yellow", markup=False, highlight=False)

    def facts(self) -> dict[str, Any]:
        """The same for a card."""
        unseen = {} if self.unseen_C is None else {"test_images_of_unseen_classes": self.unseen_images}
        return {"most_frequent_class": self.largest_share, **unseen}


def balanced_accuracy(predicted_S: Ints, labels_S: Ints) -> float:
    """The mean of the accuracies of the classes that have images here: each class counts alike, however rare."""
    images_C = np.bincount(labels_S)
    right_C = np.bincount(labels_S[predicted_S == labels_S], minlength=len(images_C))
    there_C = images_C > 0
    return float((right_C[there_C] / images_C[there_C]).mean())
