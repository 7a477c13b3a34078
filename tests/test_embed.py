"""maekit embed: the right vector beside the right name, the same bits for every batch size, and after an interruption.

References: one image at a time through `encode`, and timm's own forward_intermediates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import save_file

from maekit import cli
from maekit.data import images
from maekit.models.mae import MaskedAutoencoder
from maekit.tasks import embed
from maekit.weights.store import load, random_model

CPU = "--device cpu --precision fp32 --workers 0".split()


def save(folder: Path, **changes: Any) -> Path:
    """Random weights on disk. 8 x 8 pixels in 4 patches: so few rows that a product's last bits depend on the batch."""
    model = random_model(tiny_config(**{"img_size": (8,), "depth": 3, **changes}))
    path = folder / "weights.safetensors"
    save_file(model.state_dict(), path, metadata=model.passport.to_metadata())
    return path


def make_folder(root: Path, count: int = 37) -> Path:
    """Two classes in a training part with one broken file, and a test part."""
    random = np.random.default_rng(0)
    for index in range(count):
        part = "test" if index % 5 == 0 else "train"
        folder = root / part / ("cats" if index % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8 + index % 3, 8, 3), np.uint8)).save(folder / f"{index:02d}.png")
    (root / "train" / "cats" / "07.png").write_bytes(b"no image")
    return root


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def expected(model: MaskedAutoencoder, file: Path) -> torch.Tensor:
    """The features of one image file whose centre needs no resizing."""
    image_HWC = images.decode(file, 3)
    top = (image_HWC.shape[0] - 8) // 2
    pixels = torch.from_numpy(image_HWC[top : top + 8].copy()).permute(2, 0, 1).unsqueeze(0)
    with torch.no_grad():
        return model.encode(pixels, pool="mean")[0]


def test_every_row_is_its_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, data, out = save(tmp_path), make_folder(tmp_path / "images"), tmp_path / "f.parquet"
    assert cli.main(["embed", str(weights), "--data", str(data), "--out", str(out), *CPU]) == 0
    assert pq.read_schema(out).field("features").type == pa.list_(pa.float32())  # pyarrow below 26 reads these only
    rows, model = read(out), load(weights)
    files = {part: sorted((data / part).rglob("*.png")) for part in ("train", "test")}
    assert [row["part"] for row in rows] == ["train"] * len(files["train"]) + ["test"] * len(files["test"])
    assert [row["id"] for row in rows] == [*range(len(files["train"])), *range(len(files["test"]))]
    for row, file in zip(rows, files["train"] + files["test"], strict=True):
        assert row["name"] == file.relative_to(data).as_posix()
        assert row["class"] == file.parent.name
        assert row["label"] == ["cats", "dogs"].index(file.parent.name)
        if file.name == "07.png":
            assert row["features"] is None
            assert row["error"]
        else:
            assert row["error"] is None
            torch.testing.assert_close(torch.tensor(row["features"]), expected(model, file), rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().out
    assert "train/cats/07.png" in said
    assert "37 rows of 32" in said
    assert not Path(f"{out}.partial").exists()
    told = json.loads(pq.read_schema(out).metadata[b"maekit"])
    assert (told["pool"], told["block"], told["final_norm"]) == ("mean", 3, True)


def test_the_batch_size_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which products differ in their last bits depends on the machine, so the numbers of rows are looked at too."""
    weights, data = save(tmp_path), make_folder(tmp_path / "images")
    real, taken = MaskedAutoencoder.encode, set()

    def encode(self: MaskedAutoencoder, images_BCHW: torch.Tensor, pool: Any = "mean") -> torch.Tensor:
        taken.add(len(images_BCHW))
        return real(self, images_BCHW, pool)

    monkeypatch.setattr(MaskedAutoencoder, "encode", encode)
    tables = []
    for size in (1, 5, 32, 256):
        out = tmp_path / f"{size}.parquet"
        words = ["embed", str(weights), "--data", str(data), "--out", str(out), "--batch-size", str(size), *CPU]
        assert cli.main(words) == 0
        tables.append(pq.read_table(out))
    assert all(table.equals(tables[0]) for table in tables)
    assert taken == {16}


def test_an_interrupted_call_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, data = save(tmp_path), make_folder(tmp_path / "images", 90)
    monkeypatch.setattr(embed, "CHUNK_ROWS", 16)
    whole, out = tmp_path / "whole.parquet", tmp_path / "f.parquet"
    words = ["embed", str(weights), "--data", str(data), *CPU, "--batch-size", "16", "--out"]
    assert cli.main([*words, str(whole)]) == 0
    real, calls = embed.Encoder.features, [0]

    def features(self: embed.Encoder, images_BCHW: torch.Tensor, count: int) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(self, images_BCHW, count)

    monkeypatch.setattr(embed.Encoder, "features", features)
    assert cli.main([*words, str(out)]) == 130
    assert not out.exists()
    done = sorted(Path(f"{out}.partial").glob("*.parquet"))
    assert len(done) == 3
    done[1].write_bytes(done[1].read_bytes()[:100])  # a crash left half of it
    assert cli.main([*words, str(out)]) == 0
    assert calls[0] == 4 + 5 + 2 - 3 + 1, "what was done is not done again, the damaged chunk is"
    assert pq.read_table(out).equals(pq.read_table(whole))


def test_another_call_does_not_continue_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, data, out = save(tmp_path), make_folder(tmp_path / "images"), tmp_path / "f.parquet"
    words = ["embed", str(weights), "--data", str(data), "--out", str(out), *CPU]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed.Encoder, "features", stop)
        assert cli.main(words) == 130
    assert cli.main([*words, "--pool", "cls"]) == 2
    assert "differs in pool" in capsys.readouterr().err
    model = load(weights)
    with torch.no_grad():
        model.encoder.get_parameter("norm.bias").add_(1)
    save_file(model.state_dict(), weights, metadata=model.passport.to_metadata())
    assert cli.main(words) == 2
    assert "differs in weights_sha256" in capsys.readouterr().err


def test_npz_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, data = save(tmp_path), make_folder(tmp_path / "images")
    monkeypatch.setattr(embed, "CHUNK_ROWS", 16)  # several pieces
    words = ["embed", str(weights), "--data", str(data), "--pool", "tokens", *CPU, "--out"]
    assert cli.main([*words, str(tmp_path / "f.parquet")]) == 0
    assert cli.main([*words, str(tmp_path / "f.npz")]) == 0
    table = pq.read_table(tmp_path / "f.parquet").to_pydict()
    with np.load(tmp_path / "f.npz", allow_pickle=False) as found:
        assert found["features"].shape == (37, 5, 32)
        for row, vector in zip(found["features"], table["features"], strict=True):
            assert np.isnan(row).all() if vector is None else row.flatten().tolist() == vector
        assert [value or None for value in found["error"].tolist()] == table["error"]
        for name in ("part", "id", "name", "label", "class"):
            assert found[name].tolist() == table[name]
        assert found["class_names"].tolist() == ["cats", "dogs"]
        assert json.loads(str(found["maekit"]))["shape"] == [5, 32]


@pytest.mark.parametrize(("block", "normed"), [(1, False), (2, False), (3, True)])
def test_a_block_is_the_one_that_timm_gives(tmp_path: Path, block: int, normed: bool) -> None:
    weights, out = save(tmp_path, class_token=False, reg_tokens=0), tmp_path / "f.npz"
    data = make_folder(tmp_path / "images", 6)
    words = ["embed", str(weights), "--data", str(data), "--out", str(out), "--part", "test", "--pool", "tokens"]
    assert cli.main([*words, "--block", str(block), *CPU]) == 0
    model = load(weights)
    encoder: Any = model.encoder
    pixels = torch.from_numpy(images.decode(data / "test" / "dogs" / "00.png", 3)).permute(2, 0, 1).unsqueeze(0)
    with torch.no_grad():
        theirs = encoder.forward_intermediates(
            model.normalize(pixels), indices=[block - 1], norm=normed, output_fmt="NLC", intermediates_only=True
        )[0]
    rows = dict(zip(np.load(out)["name"].tolist(), np.load(out)["features"], strict=True))
    torch.testing.assert_close(torch.from_numpy(rows["test/dogs/00.png"]), theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--out", "f.csv"], "ends in .parquet or .npz"),
        (["--out", "old.npz"], "is there already"),
        (["--out", "f.npz", "--block", "4"], "blocks 1 to 3"),
        (["--out", "f.npz", "--part", "val"], "choose train, test or all"),
        (["--out", "f.npz", "--pool", "cls"], "no class token"),
        (["--out", "f.npz", "--batch-size", "0"], "must be above 0"),
        (["--out", "weights.safetensors/f.npz"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, class_token=False)
    make_folder(tmp_path / "images", 6)
    Path("old.npz").write_bytes(b"")
    assert cli.main(["embed", "weights.safetensors", "--data", "images", *CPU, *more]) == 2
    assert word in capsys.readouterr().err


def test_nothing_readable_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    weights, out = save(tmp_path), tmp_path / "f.parquet"
    assert cli.main(["embed", str(weights), "--data", str(tmp_path / "images"), "--out", str(out), *CPU]) == 2
    assert "none of the images can be read" in capsys.readouterr().err
    assert not out.exists()
