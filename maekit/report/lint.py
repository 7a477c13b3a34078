"""Where a run's settings are not the paper's, beside the paper's value and what is known of the difference.

A deviation is not an error: most of maekit's own recipes differ on purpose. Tables are those of He et al. 2021,
arXiv 2111.06377; accuracies in its ablations are of ViT-L/16 on ImageNet-1k, 800 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from maekit.config import FinetuneConfig, PretrainConfig
from maekit.config.segmentation import SegmentConfig, preset
from maekit.report.html import Html, join, paragraph, table
from maekit.report.values import shown
from maekit.training.optim import peak_learning_rate


@dataclass(frozen=True)
class Rule:
    """A setting: its value here and in the paper, where that stands, and what is known of the difference."""

    name: str
    here: str
    paper: str
    where: str
    follows: bool
    known: str = "no comparison known"


TARGETS = {
    "pixels": "linear probe 73.5 with pixels, 73.9 normalised; fine-tuned 84.9 and 85.4",
    "filtered": "without the components of most variance the linear probe was 2 points higher on CIFAR-10 (61.5 to "
                "63.8), 8 on STL-10 (46.0 to 53.9), one seed, by others",
}  # fmt: skip
DECODERS = {
    "self": "linear probe 65.5 with 1 block, 70.0 with 2, 71.9 with 4, 73.5 with 8; fine-tuned 84.4 to 84.9 with any",
    "cross": "reads the encoder by cross-attention: 0.2 to 0.4 points of fine-tuning and 0.3 to 1.8 of the linear "
             "probe more at ViT-S and B (CrossMAE, arXiv 2401.14391)",
    "flat": "one layer writes the whole image from all tokens: the Keras tutorial's, no part of MAE",
}  # fmt: skip


def close(one: float, other: float) -> bool:
    """Equal but for rounding."""
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))


def rate_rule(config: PretrainConfig) -> Rule:
    """The learning rate, in the paper's way of counting."""
    peak, reason = peak_learning_rate(config)
    if config.lr is not None:
        reason += f": blr {256 * config.lr / config.batch_size:.3g}"
    known = (
        "the paper's is for a batch of 4096 and hundreds of epochs; models of a few million parameters are trained "
        "with 5e-4 to 1e-3 per 256 images elsewhere"
    )
    follows = config.lr is None and config.predict_share is None and close(config.blr, 1.5e-4)
    return Rule("learning rate", reason if config.lr is not None or config.predict_share is not None else
                f"{peak:.3g} = {config.blr:g} x {config.batch_size} / 256", "1.5e-4 x batch / 256", "table 8", follows,
                known)  # fmt: skip


def pretraining_rules(config: PretrainConfig) -> list[Rule]:
    """The paper's pretraining (table 8, and the defaults of table 1)."""
    beta1, beta2 = config.betas
    return [
        Rule("AdamW's betas", f"{beta1:g}, {beta2:g}", "0.9, 0.95", "table 8", (beta1, beta2) == (0.9, 0.95),
             f"squared gradients are averaged over about {1 / max(1e-9, 1 - beta2):,.0f} steps instead of 20"),
        rate_rule(config),
        Rule("weight decay", f"{config.weight_decay:g}", "0.05", "table 8", close(config.weight_decay, 0.05)),
        Rule("batch", f"{config.batch_size:,}", "4,096", "table 8", config.batch_size == 4096,
             "of few images a large batch makes few updates: 12 an epoch of 50,000 images at 4,096"),
        warmup_rule(config),
        Rule("lowest rate", f"{config.min_lr:g}", "0 (cosine)", "table 8", config.min_lr == 0),
        Rule("mask", config.mask, "random", "table 1f", config.mask == "random",
             "on CIFAR-10 with patches of 2 px by others, one run each: linear probe 53.1 at random, 57.2 for blocks, "
             "48.2 for a grid; fine-tuned 82.2, 80.9 and 79.1"),
        Rule("mask ratio", f"{config.mask_ratio:g}", "0.75", "figure 5", close(config.mask_ratio, 0.75),
             "on CIFAR-10 with patches of 4 px the linear probe rises from 49.1 at 0.3 to 63.7 at 0.9, fine-tuning "
             "stays (github.com/wsjdsg/Bootstrapped-MAE)"),
        Rule("target", config.target, "norm-pixels", "table 1d", config.target == "norm-pixels",
             TARGETS["pixels" if config.target == "pixels" else "filtered"]),
        crop_rule(config),
        Rule("mirrored images", shown(config.flip), "yes", "section 4.1, data augmentation", config.flip),
        Rule("decoder", f"{config.decoder}, {config.decoder_depth} blocks", "self, 8 blocks", "table 1a",
             config.decoder == "self" and config.decoder_depth == 8,
             DECODERS[config.decoder]),
        Rule("decoder's width", f"{config.decoder_dim}", "512", "table 1b", config.decoder_dim == 512,
             "linear probe 69.1 at 128, 73.5 at 512"),
        Rule("positions", config.pos_embed, "sincos", "appendix A.1", config.pos_embed == "sincos"),
        Rule("clipped gradient", shown(config.clip_grad), "-", "table 8 has none", config.clip_grad is None),
        Rule("drop path", f"{config.drop_path:g}", "0", "appendix A.1", config.drop_path == 0),
        Rule("begins with", config.init or "random weights", "random weights", "section 4", not config.init),
    ]  # fmt: skip


def warmup_rule(config: PretrainConfig) -> Rule:
    """The warm-up by its share of the run: the paper's is 40 of 800 epochs."""
    pairs = ((config.warmup_epochs, config.epochs, "epochs"), (config.warmup_steps, config.steps, "steps"))
    for warmup, whole, unit in pairs:
        if warmup is not None and whole:
            part = warmup / whole
            here = f"{warmup:g} of {whole:g} {unit} ({100 * part:.3g} %)"
            return Rule("warm-up", here, "40 of 800 epochs (5 %)", "table 8", 0.045 <= part <= 0.055)
    here = f"{shown(config.warmup_epochs)} epochs, {shown(config.warmup_steps)} steps"
    return Rule("warm-up", here, "40 of 800 epochs (5 %)", "table 8", False)


def crop_rule(config: PretrainConfig) -> Rule:
    """What is cut out of an image."""
    low, high = config.crop_scale
    here = f"random-resized, {low:g} to {high:g}" if config.crop == "random-resized" else config.crop
    follows = config.crop == "random-resized" and close(low, 0.2) and close(high, 1)
    known = "linear probe 65.7 without, 73.1 at a fixed size, 73.5 at random ones"
    return Rule("crop", here, "random-resized, 0.2 to 1", "table 1e", follows, known)


def finetuning_rules(config: FinetuneConfig) -> list[Rule]:
    """The paper's fine-tuning of ViT-B (table 9)."""
    rate = f"{config.lr:g} (--lr)" if config.lr is not None else f"{config.blr:g} x {config.batch_size} / 256"
    official = "the released code has 5e-4 with layer decay 0.65 for ViT-B, and 83.57 +- 0.08 % of four seeds"
    rules = [
        ("AdamW's betas", "{} {}".format(*(f"{beta:g}" for beta in config.betas)), "0.9 0.999", ""),
        ("learning rate", rate, f"0.001 x {config.batch_size} / 256", official),
        ("layer decay", f"{config.layer_decay:g}", "0.75", official),
        ("weight decay", f"{config.weight_decay:g}", "0.05", ""),
        ("batch", f"{config.batch_size}", "1024", ""),
        ("epochs", shown(config.epochs), "100", "ViT-L and H have 50"),
        ("policy of augmentation", config.auto_augment, "rand-m9-mstd0.5-inc1", ""),
        ("label smoothing", f"{config.smoothing:g}", "0.1", ""),
        ("mixup", f"{config.mixup:g}", "0.8", ""),
        ("CutMix", f"{config.cutmix:g}", "1", ""),
        ("drop path", f"{config.drop_path:g}", "0.1", "0.2 for ViT-H"),
        ("crop", config.crop, "random-resized", ""),
        ("random erasing", f"{config.erase:g}", "0", "the released code has 0.25"),
        ("pooling", config.pool, "mean", ""),
    ]
    return [
        Rule(name, here, paper, "table 9", here == paper, known or "no comparison known")
        for name, here, paper, known in rules
    ]


def segmentation_rules(config: SegmentConfig) -> list[Rule]:
    """The paper's settings for ViT-B on ADE20K, as the preset ade20k has them."""
    theirs = preset("ade20k")
    names = {"head": "head", "head_width": "head's width", "crop": "training crop", "batch_size": "batch",
             "steps": "steps", "lr": "learning rate", "layer_decay": "layer decay", "weight_decay": "weight decay",
             "drop_path": "drop path", "schedule": "schedule", "class_weights": "weights of classes"}  # fmt: skip
    return [
        Rule(words, shown(getattr(config, name)), shown(getattr(theirs, name)), "preset ade20k",
             getattr(config, name) == getattr(theirs, name), "-")
        for name, words in names.items()
    ]  # fmt: skip


def rules_of(config: PretrainConfig | FinetuneConfig | SegmentConfig) -> list[Rule]:
    """All that is compared of a run."""
    if isinstance(config, PretrainConfig):
        return pretraining_rules(config)
    return finetuning_rules(config) if isinstance(config, FinetuneConfig) else segmentation_rules(config)


def lint(config: PretrainConfig | FinetuneConfig | SegmentConfig) -> Html:
    """The deviations as a table, and what is as in the paper in a line."""
    try:
        rules = rules_of(config)
    except (ArithmeticError, ValueError):
        return paragraph("The settings cannot be compared with the paper's.", class_="note")
    off = [rule for rule in rules if not rule.follows]
    same = ", ".join(rule.name for rule in rules if rule.follows)
    numbers = ""
    if isinstance(config, PretrainConfig):
        numbers = (
            " Accuracies (top-1 %) are the paper's ablations of ViT-L/16 on ImageNet-1k where nobody else is named."
        )
        same += ", weight decay on matrices only (as the released code has it)"
    rows = [[rule.name, rule.here, rule.paper, rule.where, rule.known] for rule in off]
    parts = [
        paragraph("A deviation is no error: it says what a comparison with the paper has to know.", numbers,
                  class_="note")
    ]  # fmt: skip
    if rows:
        headings = ["setting", "this run", "paper", "where", "what is known of the difference"]
        parts.append(table(headings, rows, "", (0, 1, 2, 3, 4), "lint"))
    else:
        parts.append(paragraph("Nothing of what is compared differs."))
    return join([*parts, paragraph(f"As in the paper: {same}." if same else "", class_="note")])
