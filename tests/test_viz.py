"""Panels show the right pixels at the right places, and curves are drawn from whatever a run recorded.

Legend: H W pixels, C channels, M hidden patches, P values of a patch (row, column, channel).
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from maekit.viz import panels, plots
from maekit.viz.panels import PanelRow, compose, draw, enlargement
from maekit.viz.plots import draw_curves
from maekit.viz.shown import levels

PATCH = 4
HEIGHT, WIDTH = 8, 12  # a grid of 2 x 3 patches
IDS = np.array([4, 0, 5, 2])  # neither sorted nor symmetric


def image(chans: int = 3, height: int = HEIGHT, width: int = WIDTH) -> npt.NDArray[np.float32]:
    """Distinct values everywhere in 0..0.4, so that any transposition, shift or swap of channels shows."""
    size = height * width * chans
    return np.linspace(0.0, 0.4, size, dtype=np.float32).reshape(height, width, chans)


def prediction(chans: int = 3) -> npt.NDArray[np.float32]:
    """Distinct values in 0.6..1 for the patches of IDS."""
    size = len(IDS) * PATCH * PATCH * chans
    return np.linspace(0.6, 1.0, size, dtype=np.float32).reshape(len(IDS), -1)


@pytest.mark.parametrize("chans", [1, 2, 3, 5])
def test_compose_puts_every_value_in_its_place(chans: int) -> None:
    img_HWC, pred_MP = image(chans), prediction(chans)
    row = compose(img_HWC, IDS, pred_MP, PATCH)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            number = (y // PATCH) * 3 + x // PATCH  # patches are counted row by row
            for c in range(chans):
                seen = img_HWC[y, x, c]
                assert row.original[y, x, c] == seen
                if number in IDS:
                    place = ((y % PATCH) * PATCH + x % PATCH) * chans + c
                    told = pred_MP[list(IDS).index(number), place]
                    assert (row.masked[y, x, c], row.reconstruction[y, x, c], row.pasted[y, x, c]) == (0.5, told, told)
                else:
                    assert (row.masked[y, x, c], row.reconstruction[y, x, c], row.pasted[y, x, c]) == (seen, 0.5, seen)
    assert row.masked_share == 4 / 6


def test_compose_clips_predictions_and_never_pixels() -> None:
    pred_MP = prediction()
    pred_MP[0, :4] = [-0.5, 1.5, math.nan, math.inf]
    row = compose(image(), IDS, pred_MP, PATCH)
    assert row.pasted[4, 4:6].ravel()[:4].tolist() == [0.0, 1.0, 0.0, 1.0]  # patch 4 starts at row 4, column 4
    assert pred_MP[0, 0] == -0.5, "the caller's array was changed"


@pytest.mark.parametrize(
    ("ids", "shape", "patch"),
    [
        ([0, 0, 1], (3, 48), 4),  # an id twice
        ([0, 1, 6], (3, 48), 4),  # outside the grid
        ([-1, 1, 2], (3, 48), 4),
        ([0, 1], (3, 48), 4),  # another number of predictions
        ([0, 1, 2], (3, 47), 4),  # another size of patch
        ([0, 1, 2], (3, 75), 5),  # a patch that does not divide the image
    ],
)
def test_compose_refuses_what_does_not_fit(ids: list[int], shape: tuple[int, int], patch: int) -> None:
    with pytest.raises(AssertionError):
        compose(image(), np.array(ids), np.zeros(shape, np.float32), patch)


@pytest.mark.parametrize("scale", [4095 / 65535, 300.0])
def test_levels_that_a_screen_hides_are_stretched(scale: float, tmp_path: Path) -> None:
    """12 of 16 bits, or floats of any range: what is shown is the same as of an image in 0..1, predictions included."""
    bright = np.random.default_rng(0).uniform(0, 1, (HEIGHT, WIDTH, 3)).astype(np.float32)
    pred_MP = np.random.default_rng(1).uniform(0.2, 0.8, (len(IDS), PATCH * PATCH * 3)).astype(np.float32)
    plain, other = compose(bright, IDS, pred_MP, PATCH), compose(scale * bright, IDS, scale * pred_MP, PATCH)
    assert (plain.stretched, other.stretched) == (False, True)
    for one, two in zip(plain.pictures, other.pictures, strict=True):
        np.testing.assert_allclose(panels.display(one), panels.display(two), atol=2)
    draw([plain], tmp_path / "plain.png", title="")
    draw([other], tmp_path / "other.png", title="")
    heights = [Image.open(tmp_path / name).height for name in ("plain.png", "other.png")]
    assert heights[0] < heights[1], "a line under the panel says so"


def test_channels_that_are_not_shown_leave_the_others_their_levels() -> None:
    """Red, green and blue of a satellite beside a near infrared ten times as bright."""
    dark_HW3 = np.random.default_rng(0).uniform(0.01, 0.03, (HEIGHT, WIDTH, 3)).astype(np.float32)
    assert levels(np.concatenate([dark_HW3, 10 * dark_HW3], axis=2)) == levels(dark_HW3) != (0.0, 1.0)


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.3],
        [0.0, 0.1],
        [-1e-6, 0.5],
        [0.0, 1.000001],
        [0.0, 0.0],
        [0.1, 0.1],
        [np.nan, np.nan],
        [0.0, 1.0],
        [np.nan, 0.9],
    ],
    ids=str,
)
def test_levels_of_a_screen_stay(values: list[float]) -> None:
    """Also where nothing could be stretched; rounding is no other range, and a dark corner of a photograph is dark."""
    assert levels(np.array(values, np.float32).reshape(1, 2, 1)) == (0.0, 1.0)


def test_compose_of_nothing_hidden() -> None:
    row = compose(image(), np.array([], np.int64), np.zeros((0, 48), np.float32), PATCH)
    assert (row.pasted == row.original).all()
    assert (row.masked == row.original).all()
    assert (row.reconstruction == 0.5).all()


def find(sheet_HW3: npt.NDArray[np.uint8], tile_HW3: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Every (top, left) at which the tile stands in the sheet, pixel for pixel."""
    height, width = tile_HW3.shape[:2]
    corners = np.argwhere((sheet_HW3 == tile_HW3[0, 0]).all(axis=2))
    return [(int(y), int(x)) for y, x in corners if np.array_equal(sheet_HW3[y : y + height, x : x + width], tile_HW3)]


def shown(picture_HWC: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The enlarged 8-bit picture, written independently: pixel (y, x) is a square of equal pixels."""
    times = enlargement(*picture_HWC.shape[:2])
    height, width = picture_HWC.shape[:2]
    tile = np.zeros((height * times, width * times, 3), np.uint8)
    for y in range(height * times):
        for x in range(width * times):
            tile[y, x] = np.round(picture_HWC[y // times, x // times, :3] * 255)
    return tile


def read(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        return np.array(picture)


def test_drawn_panels_hold_the_pictures_pixel_by_pixel(tmp_path: Path) -> None:
    row = compose(image(), IDS, prediction(), PATCH)
    other = compose(1.0 - image(), IDS, 1.0 - prediction(), PATCH)
    draw([row, other], tmp_path / "new" / "panel.png", title="two rows", note="a note", row_labels=["one", "two"])
    sheet = read(tmp_path / "new" / "panel.png")
    places = [[find(sheet, shown(picture)) for picture in each.pictures] for each in (row, other)]
    assert all(len(found) == 1 for line in places for found in line), places
    for line in places:
        tops, lefts = zip(*(found[0] for found in line), strict=True)
        assert len(set(tops)) == 1, "a row stands level"
        assert list(lefts) == sorted(lefts), "original | masked | reconstruction | pasted, from left to right"
    assert places[0][0][0][0] < places[1][0][0][0], "rows from top to bottom"
    assert [found[0][1] for found in places[0]] == [found[0][1] for found in places[1]], "columns stand plumb"
    times = enlargement(HEIGHT, WIDTH)
    assert places[1][0][0][0] - places[0][0][0][0] == HEIGHT * times + 6, "rows are 6 px apart"
    assert sheet.shape[1] - places[0][3][0][1] - WIDTH * times == 12, "the margin is 12 px wide"
    for top, left in (found[0] for found in places[0]):
        assert (sheet[top - 16 : top, left + 40 : left + WIDTH * times - 40] < 128).any(), "a heading over each column"
    top, left = places[0][0][0]
    assert times == 13  # 160 / 12
    for y, x in ((0, 0), (0, 11), (7, 0), (3, 8)):  # the middle of a few pixels of the original
        told = sheet[top + y * times + times // 2, left + x * times + times // 2]
        assert told.tolist() == np.round(row.original[y, x] * 255).tolist()


@pytest.mark.parametrize(("chans", "expected"), [(1, [51, 51, 51]), (2, [51, 102, 0]), (4, [51, 102, 153])])
def test_any_number_of_channels_is_shown(chans: int, expected: list[int], tmp_path: Path) -> None:
    img_HWC = np.broadcast_to(np.array([0.2, 0.4, 0.6, 0.8][:chans], np.float32), (96, 96, chans)).copy()
    row = compose(img_HWC, np.array([], np.int64), np.zeros((0, 16 * 16 * chans), np.float32), 16)
    draw([row], tmp_path / "panel.png", title="")
    tile = np.broadcast_to(np.array(expected, np.uint8), (96, 96, 3))
    assert len({left for _, left in find(read(tmp_path / "panel.png"), tile)}) == 3  # all but the gray reconstruction


def test_large_pictures_are_not_resized() -> None:
    assert [enlargement(*size) for size in ((224, 224), (96, 16), (16, 96), (32, 32), (28, 28), (64, 95), (1, 1))] == [
        1, 1, 1, 5, 6, 2, 160,
    ]  # fmt: skip


def test_words_do_not_move_pictures_or_fail(tmp_path: Path) -> None:
    """Dollars are no mathematics, foreign letters no warning, long words are wrapped or shortened."""
    row = compose(image(), IDS, prediction(), PATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(
            [row, row],
            tmp_path / "panel.png",
            title="a title with $\\broken and many words " * 8 + "\nand a second line",
            note="note " * 100 + "\u6f22" * 200,
            row_labels=["x" * 500, "\u6f22\u5b57_$5.png"],
        )
    sheet = read(tmp_path / "panel.png")
    assert len(find(sheet, shown(row.pasted))) == 2
    assert (sheet[:, :6] == 255).all(), "the margin is white: a label was not shortened"
    assert (sheet[:, -6:] == 255).all(), "the margin is white: a line was not wrapped"
    assert (sheet[:6] == 255).all()
    assert (sheet[-6:] == 255).all()


@pytest.mark.parametrize(
    ("shares", "heading"),
    [([0.75, 0.75], "masked 75 %"), ([0.5, 0.75], "masked 50-75 %"), ([math.nan], "masked")],
)
def test_heading_says_how_much_is_masked(shares: list[float], heading: str) -> None:
    row = compose(image(), IDS, prediction(), PATCH)
    assert panels._masked_heading([PanelRow(*row.pictures, masked_share=share) for share in shares]) == heading


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = compose(image(), IDS, prediction(), PATCH)
    path = tmp_path / "panel.png"
    draw([row], path, title="first")
    before = path.read_bytes()

    def half(self: Image.Image, where: Path, **_: object) -> None:
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space"):
        draw([row], path, title="second")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["panel.png"]


def test_drawing_leaves_matplotlib_alone() -> None:
    """No pyplot, no change of the global settings, and a user's own settings do not reach the picture."""
    code = """
import sys, numpy as np, matplotlib, tempfile, pathlib
from maekit.viz import panels, plots
folder = pathlib.Path(tempfile.mkdtemp())
row = panels.PanelRow(*[np.zeros((8, 8, 3))] * 4)
def pictures():
    panels.draw([row], folder / "a.png", title="x")
    plots.draw_curves([{"kind": "step", "epoch": 1.0, "loss": 0.5}], folder / "b.png", title="x")
    return (folder / "a.png").read_bytes(), (folder / "b.png").read_bytes()
plain = pictures()
matplotlib.rcParams.update({"text.usetex": True, "figure.facecolor": "black", "font.size": 30, "axes.facecolor": "red"})
before = matplotlib.rcParams.copy()  # dict() would look for a backend, and so import pyplot
assert pictures() == plain
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def step(epoch: object, **values: object) -> dict[str, object]:
    return {"kind": "step", "step": 1, "epoch": epoch, **values}


def heldout(epoch: float, **values: object) -> dict[str, object]:
    return step(epoch, **values) | {"kind": "heldout"}


GOOD: list[dict[str, object]] = [
    *(step(e / 10, loss=1.0 - e / 100, skill=e / 100, lr=1e-3, images_per_s=10.0) for e in range(1, 41)),
    *({"kind": "heldout", "epoch": float(e), "loss": 1.0 - e / 10, "skill": e / 10} for e in range(1, 5)),
    {"kind": "probe", "epoch": 2.0, "knn": 0.3, "linear": 0.4, "rankme": 20.0},
    {"kind": "probe", "epoch": 4.0, "knn": 0.5, "linear": 0.6, "rankme": 30.0},
]


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param([], id="empty"),
        pytest.param(GOOD, id="good"),
        pytest.param(GOOD[:1], id="one point"),
        pytest.param([step(0.0, loss=0.0, skill=0.0, lr=0.0)], id="all zero"),
        pytest.param([step(1.0, loss=math.nan, skill=None, lr=math.inf)], id="not finite"),
        pytest.param([step(None, loss=1.0), step("1", loss=1.0), step(math.nan, loss=1.0), step(True)], id="no epoch"),
        pytest.param([{}, {"kind": ["x"], "epoch": 1.0}, {"kind": "epoch", "epoch": 1.0}], id="other kinds"),
        pytest.param([step(1.0, loss="low", skill=[1], lr={})], id="no numbers"),
        pytest.param([{"kind": "probe", "epoch": 5.0, "rankme": 12.0}], id="no labels"),
        pytest.param([step(e, loss=3e38 * (-1) ** e) for e in range(3)], id="huge"),
        pytest.param([step(e / 100, loss=1 / (e + 1), skill=-e) for e in range(5000)], id="long"),
    ],
)
def test_curves_are_drawn_from_anything(metrics: list[dict[str, object]], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(iter(metrics), tmp_path / "curves.png", title="runs/$x")
    sheet = read(tmp_path / "curves.png")
    assert sheet.shape == (720, 1100, 3)
    assert sheet.std() > 3, "nothing was drawn"
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_curves_take_each_value_to_its_axes() -> None:
    """What is drawn is read back from matplotlib's own objects."""
    figure = plots.figure_of(plots.collect([*GOOD, step(4.0, loss=math.nan)]), title="x")
    loss, skill, rate, probes, rank = figure.axes
    lines = {
        (name, str(line.get_label()).rsplit(" ")[0]): np.array(line.get_xydata())
        for name, axes in zip(("loss", "skill", "lr", "probes", "rank"), (loss, skill, rate, probes, rank), strict=True)
        for line in axes.get_lines()
    }
    assert lines["loss", "training,"][:2].tolist() == [[0.1, 0.99], [0.2, 0.98]]
    assert lines["loss", "held-out"].tolist() == [[1.0, 0.9], [2.0, 0.8], [3.0, 0.7], [4.0, 0.6]]
    assert lines["skill", "held-out"].tolist() == [[1.0, 0.1], [2.0, 0.2], [3.0, 0.3], [4.0, 0.4]]
    assert lines["skill", "training,"][-1].tolist() == [4.0, 0.4]
    assert lines["lr", "now"].shape == (40, 2)
    assert lines["probes", "k-NN"].tolist() == [[2.0, 30.0], [4.0, 50.0]]
    assert lines["probes", "linear"].tolist() == [[2.0, 40.0], [4.0, 60.0]]
    assert lines["rank", "rank"].tolist() == [[2.0, 20.0], [4.0, 30.0]]
    assert [[0.0, 0.0], [1.0, 0.0]] in [np.array(line.get_xydata()).tolist() for line in skill.get_lines()], "zero line"
    assert "not finite, not drawn: 1" in [text.get_text() for text in loss.texts]
    assert not rate.texts


def test_the_legend_says_of_how_many_steps_the_training_loss_is() -> None:
    """A line of metrics.jsonl has the mean since the line before it: 20 steps, and 4 at the end of the run."""
    for steps, words in (([20, 40, 44], "last 4 steps"), ([20, 21], "last 1 step"), ([20], "last 20 steps")):
        records = [step(1.0, loss=0.5, skill=0.25) | {"step": number} for number in steps]
        for axes, value in zip(plots.figure_of(plots.collect(records), title="x").axes[:2], (0.5, 0.25), strict=True):
            assert axes.get_legend_handles_labels()[1] == [f"training, {words} {value:.4f}"]
    (label,) = (
        plots.figure_of(plots.collect([{"kind": "step", "epoch": 1, "loss": 1}]), title="x")
        .axes[0]
        .get_legend_handles_labels()[1]
    )
    assert label == "training, last logged 1.0000"


def test_titles_and_legends_do_not_meet() -> None:
    """Both stand over the axes, one from the left, the other from the right."""
    long = [record | {"images": 5000} for record in GOOD]
    with matplotlib.style.context(["default", plots.LOOK]):
        figure = plots.figure_of(plots.collect(long), title="x")
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        for axes in figure.axes[:4]:
            legend = axes.get_legend()
            assert legend is not None
            title = axes._left_title.get_window_extent(renderer)  # type: ignore[attr-defined]
            assert title.x1 < legend.get_window_extent(renderer).x0, axes.get_title(loc="left")


def test_untrained_values_do_not_flatten_the_rest() -> None:
    """The frame begins with the first held-out pass after training; with nothing else the untrained one is seen."""
    records = [heldout(0.0, loss=2.4, skill=-3.0), step(0.5, loss=1.9, skill=-2.0)]
    loss, skill = plots.figure_of(plots.collect(records), title="x").axes[:2]
    assert loss.get_ylim()[1] > 2.4
    assert skill.get_ylim()[0] < -3
    records += [heldout(1.0, loss=0.5, skill=0.05), step(1.5, loss=0.45, skill=0.1), heldout(2.0, loss=0.4, skill=0.2)]
    loss, skill = plots.figure_of(plots.collect(records), title="x").axes[:2]
    assert 0.5 < loss.get_ylim()[1] < 0.55
    assert -0.05 < skill.get_ylim()[0] < 0


def test_long_curves_keep_their_spikes() -> None:
    """Beyond MAX_POINTS the line shows means of bins, the band their extremes."""
    records = [step(float(e), loss=0.5 + (5.0 if e == 3001 else 0.0)) for e in range(4 * plots.MAX_POINTS)]
    axes = plots.figure_of(plots.collect(records), title="x").axes[0]
    (line,) = axes.get_lines()
    points = np.array(line.get_xydata())
    assert len(points) == plots.MAX_POINTS
    assert points[750].tolist() == [3001.5, 0.5 + 5.0 / 4]  # epochs 3000 to 3003
    assert points[749].tolist() == [2997.5, 0.5]
    (band,) = axes.collections
    assert np.asarray(band.get_paths()[0].vertices).max(axis=0)[1] == 5.5
    assert axes.get_ylim()[1] < 1.0, "one spike must not flatten the curve"


@pytest.mark.parametrize(
    ("points", "most", "kept"),
    [(0, 5, []), (1, 5, [0]), (5, 5, [0, 1, 2, 3, 4]), (6, 5, [1, 3, 5]), (11, 5, [1, 4, 7, 10])]
)  # fmt: skip
def test_a_line_of_fewer_points_ends_where_it_ended(points: int, most: int, kept: list[int]) -> None:
    curve = plots.Curve([float(place) for place in range(points)], [float(place) for place in range(points)])
    few = curve.thinned(most)
    assert few.values == few.epochs == kept
