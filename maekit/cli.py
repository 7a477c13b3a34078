"""The command line: subcommand -> task, nothing else. torch is loaded by the task, so help and errors come at once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from maekit.config import (
    PRESETS,
    AttendConfig,
    CheckDataConfig,
    ConvertConfig,
    DemoConfig,
    EmbedConfig,
    FinetuneConfig,
    InfoConfig,
    PackConfig,
    PlanConfig,
    PredictConfig,
    PretrainConfig,
    ProbeConfig,
    PushConfig,
    ReconstructConfig,
    ReportConfig,
    ResumeConfig,
    SelftestConfig,
    SupervisedConfig,
    UserError,
    adapt,
    asked_again,
    did_you_mean,
    foreign_flags,
    positional,
    preset_for,
    put_first,
    refuse_positional,
    typed_flags,
)
from maekit.configfile import read, written_by
from maekit.failures import in_words
from maekit.helptext import unwrap_docstrings
from maekit.processes import refuse_several

Config = TypeVar("Config")

PROBE, REPORT = "maekit probe SRC [SRC ...] --data D", "maekit report RUN [RUN ...]"
SEVERAL = ("pretrain", "resume", "finetune", "segment", "plan")
"""Commands that several processes can do together; and plan, which tells them better why it cannot."""

HELP = """\
maekit: pretrain vision transformers on your own images by masked autoencoding (MAE).

usage: maekit COMMAND ...

  demo                                pretrain and evaluate on bundled photographs, in about two minutes
  recipes                             the named configs, with cost and expected result
  pretrain RECIPE --data D --out RUN  RECIPE: a name, or a config.json; its fields are flags
  plan RECIPE --data D                a dry run: speed, memory, batch that fits, time of the whole run
  resume RUN                          continue any run exactly where its last checkpoint stands
  probe SRC [SRC ...] --data D        the evaluation card: linear probes, k-NN, few labels, beside random weights
  report RUN [RUN ...]                one HTML page of runs: curves, panels, cards, settings beside the paper's
  finetune SRC --data D               train a classifier from the encoder, with labels; test accuracy at the end
  predict SRC --data D --out F        a classifier's classes of every image, to .parquet or .csv
  segment SRC --data D                train semantic segmentation on images with class maps; mIoU
  segment RUN --predict I --out DIR   class maps and overlays of images of any size
  segment RUN --eval                  score a segmentation again: windows, flips, scales, other data
  reconstruct SRC --image I --out P   draw original | masked | reconstruction | pasted
  reconstruct SRC --data D            loss and skill on data of your choice
  embed SRC --data D --out F          features of every image, to .parquet or .npz
  convert SRC --to T --out DIR        for timm, hf, official, onnx or torch-export; outputs are compared
  attend SRC --image I --out P        draw attention maps, and patch features as colours
  push RUN OWNER/NAME                 upload weights to the Hugging Face hub, with a model card
  info SRC                            tell what a source of weights is, can do, and what to type next
  check-data --data D                 read every image: sizes, labels, and which cannot be read and why
  pack --data D --out SHARDS          write the images once, resized, into Parquet shards that load faster
  selftest resume RECIPE              prove here that a stopped run continues bit for bit

SRC   a run's folder, a weights file or folder of any known layout, timm:NAME, hub:OWNER/NAME, or random:MODEL
D     photos, digits, cifar10, cifar100, a folder of images, a .zip or .tar, Parquet, a .txt of paths, a .csv of paths
      and labels, or hub:OWNER/NAME[@REVISION][/CONFIGURATION], a data set of the Hugging Face hub

maekit COMMAND --help tells every flag; maekit --version; start with: maekit demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's error, 128 + signal for a stopped run."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        import maekit

        print(f"maekit {maekit.__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"{words[0]!r}: no such command; {did_you_mean(words[0], COMMANDS)}")
        if words[0] not in SEVERAL:
            refuse_several(words[0])
        return COMMANDS[words[0]](words[1:])
    except KeyboardInterrupt:
        print("maekit: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        from maekit.terminal import output_is_closed

        if not output_is_closed():
            raise
        return 141
    except UserError as error:
        from maekit.terminal import complain

        return complain(error.problems)
    except Exception as error:
        if (said := in_words(error)) is None:
            raise
        from maekit.terminal import complain

        return complain([said])


def parse(kind: type[Config], prog: str, words: Sequence[str], default: Config | None = None) -> Config:
    """A config from flags, by tyro; exits with code 2 where a flag is unknown or a value does not fit."""
    import tyro

    if problems := foreign_flags(words, kind):
        raise UserError(*problems)
    if {"-h", "--help"} & set(words):
        unwrap_docstrings(kind)
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each node
    if default is None:
        return tyro.cli(kind, prog=prog, args=list(words), console_outputs=speaks)
    return tyro.cli(kind, prog=prog, args=list(words), default=default, console_outputs=speaks)


def pretrain(words: list[str]) -> int:
    """maekit pretrain RECIPE --flags"""
    if not words or words[0] in ("-h", "--help"):
        return explain_recipes("pretrain", "--data D --out RUN", bool(words))
    base = recipe_or_file(words, "pretrain")
    refuse_positional(words[1:], f"pretrain {words[0]}")
    config = parse(PretrainConfig, f"maekit pretrain {words[0]}", words[1:], base)
    adapt(config, base, words)
    if (code := or_resume(config, "pretrain", words)) is not None:
        return code
    from maekit.tasks import pretrain as task

    return task.main(config)


def plan(words: list[str]) -> int:
    """maekit plan RECIPE --flags"""
    if not words or words[0] in ("-h", "--help"):
        return explain_recipes("plan", "--data D or --images N", bool(words))
    base = recipe_or_file(words, "plan")
    refuse_positional(words[1:], f"plan {words[0]}")
    defaults = PlanConfig(**vars(base))
    given = typed_flags(words)
    if "--images" in given and "--data" not in given:
        defaults.data = ""  # the recipe's own, which was not asked for
    config = parse(PlanConfig, f"maekit plan {words[0]}", words[1:], defaults)
    adapt(config, base, words)
    from maekit.tasks import plan as task

    return task.main(config, base, words[0])


def explain_recipes(command: str, needs: str, asked: bool) -> int:
    """The help of a command that wants a recipe first; an error where nobody asked for help."""
    print(f"usage: maekit {command} RECIPE {needs} [any field of the recipe]\n")
    print_recipes()
    print(f"\nmaekit {command} RECIPE --help tells every flag with the recipe's values")
    return 0 if asked else 2


def recipe_or_file(words: Sequence[str], command: str) -> PretrainConfig:
    """The config that a recipe's name or a run's config.json, the first word, stands for."""
    from maekit import recipes

    word = words[0]
    if word.startswith("-"):
        names = ", ".join(recipes.names())
        meant = put_first(words, command) if words[-1] in recipes.names() else ""
        raise UserError(f"the recipe comes first: maekit {command} RECIPE ...{meant}; recipes: {names}")
    if not word.endswith(".json"):
        return recipes.get(word)
    path = Path(word).expanduser()
    if not path.is_file():
        raise UserError(f"{word}: no such config file")
    base = read(PretrainConfig, path)
    base.out = ""
    return base


def resume(words: list[str]) -> int:
    """maekit resume RUN --flags"""
    folder, rest = positional(words, "maekit resume RUN", "a run's folder")
    changes = parse(ResumeConfig, "maekit resume RUN", rest)
    return continue_run(written_by(folder[0]) or "pretrain", folder[0], changes)


def continue_run(task: str, folder: str, changes: ResumeConfig) -> int:
    """Continue a run of a task."""
    if task not in ("pretrain", "finetune", "segment"):
        raise UserError(f"{folder}: config.json names {task!r}, no task whose runs are continued")
    return int(import_module(f"maekit.tasks.{task}").resume(folder, changes))


def or_resume(asked: PretrainConfig | SupervisedConfig, task: str, words: Sequence[str]) -> int | None:
    """--or-resume: continue the run that the same command began; None where there is none yet, or it was not asked."""
    if not asked.or_resume:
        return None
    if not asked.out:
        raise UserError("--or-resume: give --out, the folder in which the run is or begins")
    path = Path(asked.out) / "config.json"
    if not path.is_file():
        asked.or_resume = False  # the run's own config does not keep it
        return None
    if (held := written_by(asked.out) or "pretrain") != task:
        raise UserError(f"--or-resume: {asked.out} holds a run of maekit {held}; give another --out")
    again = asked_again(asked, read(type(asked), path), typed_flags(words), asked.out)
    return continue_run(task, asked.out, again)


def finetune(words: list[str]) -> int:
    """maekit finetune SRC --data D"""
    source, rest = positional(words, "maekit finetune SRC --data D", "a source of weights")
    base = finetune_defaults(source[0] if source else "", rest)
    config = parse(FinetuneConfig, "maekit finetune SRC", rest, base)
    adapt(config, base, rest)
    config.source = source[0]
    config.adapt(typed_flags(rest))
    if (code := or_resume(config, "finetune", rest)) is not None:
        return code
    if config.eval:
        refuse_several("finetune --eval")
    return int(import_module(f"maekit.tasks.finetune{'_score' if config.eval else ''}").main(source[0], config))


def finetune_defaults(source: str, words: list[str]) -> FinetuneConfig:
    """The preset that is asked for, or that suits a run's image size; mirrored images where the run had them too."""
    path = Path(source).expanduser() / "config.json"
    run = None
    if source and path.is_file() and not written_by(str(path.parent)):
        with contextlib.suppress(UserError):  # whatever is wrong there is told when the weights are read
            run = read(PretrainConfig, path)
    name: str = preset_for(run.img_size) if run is not None and run.img_size else "paper"
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.partition("=")[0] == "--preset":
            name = word.partition("=")[2] or following
    if name not in PRESETS:
        raise UserError(f"--preset {name}: {did_you_mean(name, PRESETS)}")
    return dataclasses.replace(PRESETS[name], flip=True if run is None else run.flip)


def on_sources(words: list[str], task: str, kind: type[Any], usage: str, what: str) -> int:
    """maekit TASK SRC [SRC ...] --flags, of the tasks that take any number of sources and a config."""
    sources, rest = positional(words, usage, what, several=True)
    config = parse(kind, f"maekit {task} {usage.split()[2]} [{usage.split()[2]} ...]", rest)
    return int(import_module(f"maekit.tasks.{task}").main(sources, config))


def segment(words: list[str]) -> int:
    """maekit segment SRC --data D, or RUN --predict IMAGES --out DIR, or RUN --eval"""
    from maekit.config import segmentation as configs

    usage = "maekit segment SRC --data D"
    source, rest = positional(words, usage, "a source of weights")
    given = typed_flags(rest)
    other: dict[str, type[Any]] = {"--predict": configs.SegmentPredictConfig, "--eval": configs.SegmentScoreConfig}
    for flag, kind in other.items():
        if flag in given:
            refuse_several(f"segment {flag}")
            asked = parse(kind, f"maekit segment RUN {flag}", [word for word in rest if word != "--eval"])
            name = "segment_predict" if flag == "--predict" else "segment_score"
            return int(import_module(f"maekit.tasks.{name}").main(source[0], asked))
    config = parse(configs.SegmentConfig, usage, rest, configs.preset(configs.preset_of(rest)))
    config.source = source[0]
    config = configs.adapted(config, given)
    if (code := or_resume(config, "segment", rest)) is not None:
        return code
    from maekit.tasks import segment as task

    return task.main(config)


def on_source(words: list[str], task: str, kind: type[Any], usage: str) -> int:
    """maekit TASK SRC --flags, of the tasks that take one source of weights and a config."""
    source, rest = positional(words, usage, "a source of weights")
    config = parse(kind, f"maekit {task} SRC", rest)
    return int(import_module(f"maekit.tasks.{task}").main(source[0], config))


def push(words: list[str]) -> int:
    """maekit push RUN OWNER/NAME"""
    usage = "maekit push RUN OWNER/NAME"
    asked, rest = positional(words, usage, "a run's folder", several=True)
    if len(asked) != 2 and not {"-h", "--help"} & set(rest):
        raise UserError(f"a run's folder and a name on the hub are needed: {usage}")
    config = parse(PushConfig, usage, rest)
    from maekit.tasks import push as task

    return task.main(asked[0], asked[1], config)


def on_data(words: list[str], task: str, kind: type[Any]) -> int:
    """maekit TASK --flags, of the tasks that take a config and nothing else."""
    refuse_positional(words, task)
    config = parse(kind, f"maekit {task}", words)
    return int(import_module(f"maekit.tasks.{task.replace('-', '_')}").main(config))


def selftest(words: list[str]) -> int:
    """maekit selftest resume RECIPE --flags"""
    usage = "maekit selftest resume RECIPE"
    asked, rest = positional(words, usage, "what to test", several=True)
    if asked[:1] not in ([], ["resume"]):
        raise UserError(f"selftest {asked[0]}: choose from resume: {usage}")
    if len(asked) != 2 and not {"-h", "--help"} & set(rest):
        raise UserError(f"one recipe at a time: {usage}")
    recipe_or_file(asked[1:] or ["folder"], "selftest resume")
    config = parse(SelftestConfig, usage, rest)
    from maekit.tasks import selftest as task

    return task.main(asked[1], config)


def list_recipes(words: list[str]) -> int:
    """maekit recipes [NAME]"""
    if {"-h", "--help"} & set(words):
        print("usage: maekit recipes [NAME ...]: what each recipe is, costs and gives; of a NAME also its command")
        return 0
    from maekit import recipes

    for name in words:
        recipes.get(name)
    print_recipes(words or None)
    if not words:
        print("\nmaekit recipes NAME also tells the command and where the values come from")
    return 0


def print_recipes(only: list[str] | None = None) -> None:
    """Every recipe with its cost and expected result, as its file's header says; chosen ones with all the header."""
    from rich.console import Console
    from rich.padding import Padding

    from maekit import recipes

    console = Console(highlight=False, markup=False)
    for name in only or recipes.names():
        says = recipes.header(name)
        console.print(name, style="bold")
        for key in says if only else ("what", "cost", "expected"):
            console.print(Padding(says[key] if key == "what" else f"{key}: {says[key]}", (0, 0, 0, 4)))


def demo(words: list[str]) -> int:
    """maekit demo"""
    asked = parse(DemoConfig, "maekit demo", words)
    from maekit import demo as job

    return job.main(asked)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "recipes": list_recipes,
    "pretrain": pretrain,
    "plan": plan,
    "resume": resume,
    "probe": partial(on_sources, task="probe", kind=ProbeConfig, usage=PROBE, what="a source of weights"),
    "report": partial(on_sources, task="report", kind=ReportConfig, usage=REPORT, what="a run's folder"),
    "finetune": finetune,
    "predict": partial(on_source, task="predict", kind=PredictConfig, usage="maekit predict SRC --data D --out F"),
    "segment": segment,
    "reconstruct": partial(on_source, task="reconstruct", kind=ReconstructConfig, usage="maekit reconstruct SRC ..."),
    "embed": partial(on_source, task="embed", kind=EmbedConfig, usage="maekit embed SRC --data D --out F"),
    "convert": partial(on_source, task="convert", kind=ConvertConfig, usage="maekit convert SRC --to T --out DIR"),
    "attend": partial(on_source, task="attend", kind=AttendConfig, usage="maekit attend SRC --image I"),
    "push": push,
    "info": partial(on_source, task="info", kind=InfoConfig, usage="maekit info SRC"),
    "check-data": partial(on_data, task="check-data", kind=CheckDataConfig),
    "pack": partial(on_data, task="pack", kind=PackConfig),
    "selftest": selftest,
}


def run() -> NoReturn:
    """The `maekit` program."""
    sys.exit(main())
