"""Stop signals: whatever the run does when one comes, it ends soon, with its code, and loses nothing.

The signals are real, sent to this process at a chosen place; only what must die, or needs two processes, is forked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_classes
import tiny_pairs
import tiny_runs
from accelerate import Accelerator
from conftest import NEEDS_FORK, tiny_config
from tiny_runs import DIGITS, assert_same_run, checkpoints, folder_words, make_images, metrics, run, state

from maekit import cli
from maekit.data import loader
from maekit.data.parts import FilePart
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import Choice
from maekit.stopping import StopRequest
from maekit.tasks import finetune, pretrain, segment
from maekit.training import checkpoint, monitor, prepare
from maekit.training import run as run_module
from maekit.weights.store import random_model
from maekit.weights.written import write_weights

PROMISE = "stop signals: the step is finished and saved, and the exit code says so"

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
WORDS = [*DIGITS, "--steps", "4", "--eval-every", "0.1818", "--probe-every", "0.1818", "--save-every", "10"]
"""Held-out loss and probe after 2 and 4 steps."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures; and whatever happens, the handlers are those from before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    tiny_runs.without_pictures(monkeypatch)
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a signal."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        assert run(WORDS, out) == 0
    return out


def kill_me(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def before_call(
    patch: pytest.MonkeyPatch, owner: Any, name: str, at: int, act: Callable[[], Any] = kill_me
) -> list[float]:
    """Act before the n-th call (from 1) of a function; returns when that was, once it was."""
    real, count, when = getattr(owner, name), [0], []

    def called(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            when.append(time.monotonic())
            act()
        return real(*arguments, **named)

    patch.setattr(owner, name, called)
    return when


def slowly(seconds: float = 60) -> None:
    """A signal to this process, in the middle of something that takes long."""
    kill_me()
    time.sleep(seconds)


def test_the_codes() -> None:
    codes: dict[str, int] = {}
    for number in SIGNALS:
        request = StopRequest()
        with request.listening():
            kill_me(number)
            time.sleep(1)
            raise AssertionError("it should have been stopped")
        codes[request.name] = request.exit_code
    assert codes == {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (prepare, "open_configured"),
        (loader, "common_size"),
        (prepare, "channel_statistics"),
        (prepare, "MaskedAutoencoder"),
        (run_module, "training_trivial"),
        (run_module, "heldout_sums"),
    ],
)
def test_before_there_is_anything_to_save(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, measuring, building: it ends at once and leaves nothing behind, so that the command can be repeated."""
    if owner is loader:
        (tmp_path / "run").mkdir()  # an empty folder is as good as none
    number = SIGNALS[len(name) % 3]

    def act() -> None:
        kill_me(number)
        time.sleep(60)

    when = before_call(monkeypatch, owner, name, 1, act)
    assert run(WORDS, tmp_path / "run") == 128 + number
    assert time.monotonic() - when[0] < 20
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("task", [pretrain, finetune, segment])
def test_trackers_are_closed_where_a_run_is_stopped(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's keeps two minutes of numbers back until it is closed, and NCCL warns of a group that is not."""
    closed: list[Any] = []
    monkeypatch.setattr(Accelerator, "end_training", lambda self: closed.append(self))
    if task is segment:
        tiny_pairs.leave_pictures_out(monkeypatch)
        tiny_pairs.write_pairs(tmp_path / "data")
        model = random_model(tiny_config(depth=4), seed=5)
        write_weights(tmp_path / "mae.safetensors", model, model.passport)
    before_call(monkeypatch, task, "backward", 3)
    if task is segment:
        assert tiny_pairs.train(tmp_path, tmp_path / "run") == 143
    elif task is finetune:
        source = str(tiny_classes.write_encoder(tmp_path / "source"))
        assert run(["finetune", source, *tiny_classes.TRAINING, "--epochs", "1"], tmp_path / "run") == 143
    else:
        assert run(WORDS, tmp_path / "run") == 143
    assert len(closed) == 1


def test_while_the_first_step_compiles(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of compilation are not waited for: the checkpoint of this position stands already."""
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "GRACE", 0.3)
        patch.setattr(prepare, "choose_compile", lambda *_, **__: Choice("whole", "for the test"))
        patch.setattr(pretrain, "compile_or_eager", lambda model, how, report: lambda *_, **__: slowly())
        began = time.monotonic()
        assert run(WORDS, tmp_path / "run") == 143
        assert time.monotonic() - began < 20
    assert checkpoints(tmp_path / "run") == ["step-000000"]
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.parametrize(
    ("owner", "name", "at", "act", "step"),
    [
        (MaskedAutoencoder, "loss", 2, kill_me, 1),  # in the first step; the first call was the held-out pass
        (pretrain, "backward", 3, kill_me, 3),
        (pretrain, "guarded_update", 4, kill_me, 4),  # the last one: held-out pass and probe are left for the resume
        (run_module, "heldout_sums", 2, slowly, 2),
        (run_module, "online_probe", 1, slowly, 2),
        (monitor, "extract_features", 4, slowly, 4),
        (pretrain, "draw_pictures", 1, kill_me, None),
        (checkpoint, "_write_tensors", 5, kill_me, None),  # the last save is finished, and so is the run
    ],
)
def test_wherever_it_comes(
    owner: Any, name: str, at: int, act: Any, step: int | None, alone: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A step is finished, an evaluation is cut short and done again; the resumed run is the run left alone."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        when = before_call(patch, owner, name, at, act)
        code = run(WORDS, out)
    assert time.monotonic() - when[0] < 20
    assert code == (143 if step else 0)
    if step:
        assert state(out)["step"] == step
        assert cli.main(["resume", str(out)]) == 0
    assert_same_run(alone, out)


def test_pictures_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while they are drawn: no picture yet, and the resumed run draws them, though its steps are all done."""
    monkeypatch.undo()
    words = [*DIGITS, "--steps", "1"]
    with monkeypatch.context() as patch:
        before_call(patch, pretrain, "compose", 1, slowly)
        assert run(words, tmp_path / "run") == 143
    assert (state(tmp_path / "run")["step"], state(tmp_path / "run")["watched"]) == (1, 0)
    assert not (tmp_path / "run" / "curves.png").exists()
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    assert [line["kind"] for line in metrics(tmp_path / "run")] == ["heldout", "step", "heldout"]


# ---- data that do not come ----


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A folder that is streamed, two parts a step; and its run without a signal."""
    root = tmp_path_factory.mktemp("streamed")
    words = [*folder_words(make_images(root / "images")), "--accum", "2", "--steps", "3", "--mean", "0.5", "0.5", "0.5",
             "--std", "0.3", "0.3", "0.3", "--max-bad-share", "0"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        assert run(words, root / "run") == 0
    return words, root / "run"


def read_hangs(patch: pytest.MonkeyPatch, part: int, seconds: float = 60) -> None:
    """From the n-th part (from 0) of the training batches on, reading its images takes for ever."""
    order = loader.SampleOrder(loader.split_heldout(40, 0.02)[0], 8, seed=0)
    hanging = set(order.step_ids(part // 2)[1][4 * (part % 2) : 4 * (part % 2) + 4].tolist())
    real = FilePart.read

    def read(self: FilePart, index: int, *look: Any) -> Any:
        if index in hanging and os.environ.get("TEST_HANGS"):
            time.sleep(seconds)
        return real(self, index, *look)

    patch.setattr(FilePart, "read", read)
    before_call(patch, pretrain, "open_parts", 1, lambda: patch.setenv("TEST_HANGS", "1"))


@pytest.mark.parametrize(
    ("workers", "part", "done"),
    [(0, 2, 1), pytest.param(2, 2, 1, marks=NEEDS_FORK), (0, 3, 1), pytest.param(2, 5, 2, marks=NEEDS_FORK)],
)
def test_data_that_do_not_come(
    workers: int, part: int, done: int, streamed: tuple[list[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Between two steps (an even part) at once; within one after the grace, and the step is begun anew on resume.

    Workers that hang in a read, deaf to signals, do not keep the process."""
    words, alone = streamed
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "GRACE", 0.3)
        read_hangs(patch, part)
        # a timer of the test's own thread: the signal arrives while the main thread waits
        when = before_call(patch, pretrain, "next_part", part + 1, lambda: threading.Timer(0.3, kill_me).start())
        assert run([*words, "--workers", str(workers)], tmp_path / "run") == 143
        assert time.monotonic() - when[0] < 8  # a loader by itself waits 5 s for each of its workers
    assert state(tmp_path / "run")["step"] == done
    assert cli.main(["resume", str(tmp_path / "run"), "--workers", "0"]) == 0
    assert_same_run(alone, tmp_path / "run")


def test_a_step_that_was_begun_is_finished(
    streamed: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part comes within the grace: the step counts."""
    words, _ = streamed
    read_hangs(monkeypatch, 3, seconds=0.1)
    before_call(monkeypatch, pretrain, "next_part", 4)
    assert run(words, tmp_path / "run") == 143
    assert state(tmp_path / "run")["step"] == 2


def test_workers_ignore_the_signals(
    streamed: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's Ctrl-C reaches the whole group; the workers go on, and so does the run that did not get it."""
    words, alone = streamed
    told: list[int] = []

    def tell_workers() -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            for number in SIGNALS:
                os.kill(child.pid, number)
            told.append(child.pid)

    before_call(monkeypatch, pretrain, "guarded_update", 1, tell_workers)
    assert run([*words, "--workers", "2"], tmp_path / "run") == 0
    assert len(told) == 2
    assert metrics(tmp_path / "run") == metrics(alone)


# ---- forked ----


def test_a_second_signal_stops_at_once_without_harm(alone: Path, tmp_path: Path) -> None:
    """In the middle of a save, the first finishes it; the second kills. The next save sweeps up what is left."""
    out = tmp_path / "run"

    def job() -> int:
        with pytest.MonkeyPatch.context() as patch:
            tiny_runs.without_pictures(patch)
            real = checkpoint._write_tensors
            count = [0]

            def write(path: Path, *rest: Any) -> None:
                count[0] += 1
                real(path, *rest)
                if count[0] == 4:
                    kill_me(signal.SIGTERM)
                    time.sleep(0.2)  # remembered: the save goes on
                    kill_me(signal.SIGINT)

            patch.setattr(checkpoint, "_write_tensors", write)
            return run([*WORDS, "--save-every", "0.0909"], out)

    assert tiny_runs.ends([tiny_runs.fork(job, tmp_path / "log")]) == [-signal.SIGINT], (tmp_path / "log").read_text()
    left = checkpoints(out)
    assert left[0].startswith(".step-000001.tmp-")
    assert left[1:] == ["step-000000"]
    assert cli.main(["resume", str(out)]) == 0
    assert not any(name.startswith(".") for name in checkpoints(out))
    assert_same_run(alone, out)


def test_two_processes_stop_together(tmp_path: Path) -> None:
    """The data of one do not come, the other waits for it in the step; both get the signal, and end with a checkpoint
    of the same position, from which one process goes on."""
    images = make_images(tmp_path / "images")
    words = [*folder_words(images), "--steps", "5", "--drop-path", "0"]
    waiting = tmp_path / "waiting"

    def job(rank: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            tiny_runs.without_pictures(patch)
            if rank == 1:

                def hang() -> None:
                    waiting.touch()
                    time.sleep(60)

                next_read = lambda: before_call(patch, FilePart, "read", 1, hang)  # noqa: E731
                before_call(patch, pretrain, "next_part", 4, next_read)
            return run(words, tmp_path / "run")

    children = tiny_runs.fork_ranks(job, tmp_path)
    began = time.monotonic()
    while not waiting.exists():
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    sent = time.monotonic()
    for child in children:
        os.kill(child, signal.SIGUSR1)
    assert tiny_runs.ends(children) == [138, 138], "".join((tmp_path / f"rank{r}.log").read_text() for r in (0, 1))
    assert time.monotonic() - sent < 25
    assert state(tmp_path / "run")["step"] == 3
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert run(words, tmp_path / "alone") == 0
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "alone"), strict=True):
        assert one["kind"] == other["kind"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
