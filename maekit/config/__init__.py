"""Every task's configuration as a typed dataclass: the one source of its defaults, help texts and types.

This package imports no torch, so that `maekit --help` answers at once. A field's docstring is its help text.
A recipe is a complete value of `PretrainConfig`; the resolved value is saved as JSON beside the run.
"""

from maekit.config.base import UserError, adapt, adapt_durations, did_you_mean, flag, typed_flags
from maekit.config.datasets import CheckDataConfig, PackConfig
from maekit.config.evaluation import ProbeConfig, ReconstructConfig
from maekit.config.finetuning import PRESETS, FinetuneConfig, PredictConfig, preset_for
from maekit.config.planning import PlanConfig
from maekit.config.pretraining import (
    MAX_MASK_RATIO,
    DataConfig,
    DemoConfig,
    ModelConfig,
    PretrainConfig,
    SelftestConfig,
)
from maekit.config.reporting import ReportConfig
from maekit.config.resuming import ResumeConfig, asked_again, changed
from maekit.config.supervised import SupervisedConfig
from maekit.config.transfer import AttendConfig, ConvertConfig, EmbedConfig, PushConfig
from maekit.config.weights import FILE_FACTS, InfoConfig, SourceConfig
from maekit.config.words import foreign_flags, positional, put_first, refuse_positional

__all__ = [
    "FILE_FACTS",
    "MAX_MASK_RATIO",
    "PRESETS",
    "AttendConfig",
    "CheckDataConfig",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "EmbedConfig",
    "FinetuneConfig",
    "InfoConfig",
    "ModelConfig",
    "PackConfig",
    "PlanConfig",
    "PredictConfig",
    "PretrainConfig",
    "ProbeConfig",
    "PushConfig",
    "ReconstructConfig",
    "ReportConfig",
    "ResumeConfig",
    "SelftestConfig",
    "SourceConfig",
    "SupervisedConfig",
    "UserError",
    "adapt",
    "adapt_durations",
    "asked_again",
    "changed",
    "did_you_mean",
    "flag",
    "foreign_flags",
    "positional",
    "preset_for",
    "put_first",
    "refuse_positional",
    "typed_flags",
]
