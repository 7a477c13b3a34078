"""Upload a run's weights to the Hugging Face hub, with a model card.

    maekit push runs/c10 me/mae-cifar10 --private

Two files go there: model.safetensors with its passport, and README.md: what the model is, its data's name, recipe and
licence, the probes' numbers where `maekit probe` has written any, how to load it. Panels and configs stay: they hold
images and paths of this machine. Cost: the upload.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

from rich.markup import escape
from safetensors.torch import save_file

from maekit.config import PushConfig, UserError
from maekit.models.classifier import Classifier
from maekit.models.mae import MaskedAutoencoder
from maekit.terminal import make_console
from maekit.weights.card import find_cards, model_card
from maekit.weights.hub import upload
from maekit.weights.segmenters import is_segmenter
from maekit.weights.store import WEIGHTS_FILE, load

UNSPECIFIED = "unspecified"


def main(source: str, name: str, config: PushConfig) -> int:
    """Check the weights by loading them, write the card, upload both as one commit.

    Raises:
        UserError: weights that cannot be loaded, a name that is none, a licence that is not ours to change, or a hub
            that refuses or cannot be reached.
    """
    console = make_console()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name}: no name of a repository; write owner/name")
    given = Path(source).expanduser()
    path = given / WEIGHTS_FILE if given.is_dir() else given
    if not path.is_file():
        raise UserError(f"{source}: no run with weights and no weights file; only files can be pushed")
    if is_segmenter(path):
        raise UserError(
            f"{source}: holds a segmenter, which would lose its head here; upload the file as it is: hf upload {name} "
            f"{path} {WEIGHTS_FILE}"
        )
    model = load(path)
    license_it(model, source, config)
    cards = find_cards(given) if given.is_dir() else {}
    word, call = ("classifier", "names = classifier.predict(images).names") if isinstance(model, Classifier) else (
        "mae", "features = mae.encode(images)"
    )  # fmt: skip
    read = f'images = maekit.read_images(["photo.jpg"], {word})  # or uint8 [batch, channel, row, column]'
    usage = f'import maekit\n\n{word} = maekit.load("hub:{name}")\n{read}\n{call}'
    card = model_card(name.split("/")[1], model.passport, usage, cards, "maekit")
    size = path.stat().st_size
    console.print(f"{WEIGHTS_FILE} ({size / 1e6:,.1f} MB) and README.md to {name}:\n")
    console.print(f"[dim]{escape(card)}[/dim]", soft_wrap=True)
    if config.dry_run:
        console.print("nothing was uploaded (--dry-run)")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # Written anew: a run that trains may replace its file during the upload, and the licence may be a new one.
        weights = Path(folder) / WEIGHTS_FILE
        save_file(model.state_dict(), weights, metadata=model.passport.to_metadata())
        address = upload(
            name, {WEIGHTS_FILE: weights, "README.md": card.encode()}, private=config.private, message=config.message
        )
    console.print(f"uploaded: {escape(address)}", soft_wrap=True)
    if model.passport.weights_license.startswith(UNSPECIFIED):
        console.print("[yellow]nobody may use weights without a licence: --license NAME states one[/yellow]")
    return 0


def license_it(model: MaskedAutoencoder | Classifier, source: str, config: PushConfig) -> None:
    """State the owner's licence in the passport; one that is there already is not ours to change."""
    held = model.passport.weights_license
    if config.license is None or config.license == held:
        return
    if not held.startswith(UNSPECIFIED):
        raise UserError(f"--license {config.license}: {source} holds weights under another one already ({held})")
    if not config.license.isprintable() or not config.license.strip():
        raise UserError(f"--license {config.license!r}: must be a printable name, such as apache-2.0")
    model.passport = dataclasses.replace(model.passport, weights_license=config.license)
