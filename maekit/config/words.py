"""The words of a command line before its flags are parsed: sources that stand first, and flags of other codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from maekit.config.base import UserError
from maekit.config.finetuning import FinetuneConfig
from maekit.config.pretraining import PretrainConfig
from maekit.config.resuming import ResumeConfig
from maekit.config.segmentation import SegmentConfig

_RUNS = (PretrainConfig, FinetuneConfig, SegmentConfig)
PAGE = "docs/coming-from.md has the flags of other codes in ours"
HABITS: dict[str, str] = {
    "data_path": "--data",
    "train_dir": "--data",
    "dataset_name": "--data hub:OWNER/NAME",
    "dataset_config_name": "--data hub:OWNER/NAME/CONFIGURATION",
    "output_dir": "--out",
    "accum_iter": "--accum, and --batch-size counts all processes and accumulation steps",
    "gradient_accumulation_steps": "--accum, and --batch-size counts all processes and accumulation steps",
    "per_gpu_batch_size": "--batch-size, which counts all processes and accumulation steps",
    "per_device_train_batch_size": "--batch-size, which counts all processes and accumulation steps",
    "base_learning_rate": "--blr",
    "learning_rate": "--lr",
    "num_train_epochs": "--epochs",
    "warmup_ratio": "--warmup-epochs",
    "epochs": "--lars-epochs, for the paper's linear probe",
    "norm_pix_loss": "--target norm-pixels, which is the usual; --target pixels where that flag was not given",
    "input_size": "--img-size",
    "encoder_depth": "--depth",
    "encoder_embed_dim": "--embed-dim",
    "encoder_num_heads": "--num-heads",
    "decoder_embed_dim": "--decoder-dim",
    "decoder_num_heads": "--decoder-heads",
    "max_grad_norm": "--clip-grad",
    "aa": "--auto-augment",
    "random_aug_magnitude": "--auto-augment rand-m9-mstd0.5-inc1, for a magnitude of 9",
    "mixup_alpha": "--mixup",
    "cutmix_alpha": "--cutmix",
    "label_smoothing": "--smoothing",
    "reprob": "--erase",
    "remode": "--erase-mode",
    "recount": "--erase-count",
    "resplit": "",
    "num_workers": "--workers",
    "dataloader_num_workers": "--workers",
    "pin_mem": "nothing to say: memory is pinned where there is a GPU",
    "no_pin_mem": "nothing to say: memory is pinned where there is a GPU",
    "finetune": "the source of weights stands first, without a flag: maekit finetune SRC --data D",
    "model_name_or_path": "the source of weights stands first, without a flag: maekit finetune SRC --data D",
    "start_epoch": "maekit resume RUN knows it",
    "resume": "maekit resume RUN continues a run, exactly; --or-resume in the command that began it does the same",
    "resume_from_checkpoint": "maekit resume RUN continues a run, exactly",
    "dist_url": "torchrun --nproc_per_node N -m maekit ... starts several processes",
    "dist_on_itp": "torchrun --nproc_per_node N -m maekit ... starts several processes",
    "world_size": "torchrun --nproc_per_node N -m maekit ... starts several processes",
    "local_rank": "torchrun --nproc_per_node N -m maekit ... starts several processes",
    "dist_eval": "nothing to say: processes share what is scored",
    "nb_classes": "nothing to say: the classes are those of the labels",
    "save_checkpoint_interval": "--save-minutes; in a pretraining --save-every",
    "cls_token": "--pool cls",
    "global_pool": "--pool mean",
    "log_dir": "metrics.jsonl is always written; --trackers tensorboard besides",
    "log_wandb": "metrics.jsonl is always written; --trackers wandb besides",
    "logging_steps": "--log-every",
    "custom_weight_init": "--first-values keras, or nothing for the paper's",
    "kept_mask_ratio": "--predict-share, a share of all patches too",
    "cross_mae": "--decoder cross",
    "weight_fm": "--decoder cross, which weighs all of the encoder's blocks",
    "use_fm": "--decoder cross, which weighs all of the encoder's blocks",
    "self_attn": "--decoder self",
    "image_column_name": "--image-column",
    "train_val_split": "--heldout-share",
    "max_train_samples": "--train-images",
}
"""Flags of the official code, its PyTorch reproduction, CrossMAE's and Hugging Face's script, without dashes and in
their spelling: what is typed here. Empty: there is nothing of the kind."""


def foreign_flags(words: Sequence[str], kind: type[Any]) -> list[str]:
    """What is to be said of flags that are typed out of a habit, a line each; those that `kind` has are its own."""
    own = {item.name for item in dataclasses.fields(kind)}
    kept = {item.name for run in _RUNS for item in dataclasses.fields(run)} if kind is ResumeConfig else set()
    found: list[str] = []
    fixed: list[str] = []
    for word in words:
        spelled = word.partition("=")[0]
        name = spelled.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name in own or name.removeprefix("no_") in own:
            continue
        if name in kept:
            fixed.append(f"{spelled}: a run keeps what it began with; maekit resume --help has what may change")
        elif name in HABITS:
            advice = HABITS[name] or "there is nothing of the kind"
            wanted = advice.split()[0].strip(",;:")
            if wanted.startswith("--"):
                there = wanted.removeprefix("--").replace("-", "_") in own
                advice = f"take {advice}" if there else f"commands that can do this call it {wanted}"
            found.append(f"{spelled}: no flag of this command; {advice}")
    if found:
        found[-1] += f" ({PAGE})"
    return found + fixed


def positional(words: Sequence[str], usage: str, what: str, several: bool = False) -> tuple[list[str], list[str]]:
    """The leading words that are no flags, and the rest; `--help` needs none."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if not count and not {"-h", "--help"} & set(words):
        where = ", which stands before the flags" if words else ""
        raise UserError(f"{what} is missing{where}: {usage}{put_first(words, usage.split()[1])}")
    if count > 1 and not several:
        raise UserError(f"{words[1]!r}: one source at a time: {usage}")
    return list(words[:count]), list(words[count:])


def put_first(words: Sequence[str], command: str) -> str:
    """Where the last word looks like the one that should have been the first: the command so; else nothing."""
    if len(words) < 3 or words[-1].startswith("-") or words[-2].startswith("-"):
        return ""
    return f"; perhaps: maekit {command} {words[-1]} {' '.join(words[:-1])}"


def refuse_positional(words: Sequence[str], command: str) -> None:
    """Refuse words in front of the flags where there can be flags only: most often they are data.

    Raises:
        UserError: a word that is no flag stands first.
    """
    if words and not words[0].startswith("-"):
        raise UserError(f"{words[0]!r}: a flag says what it is: maekit {command} --data {' '.join(words)}")
