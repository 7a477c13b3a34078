"""maekit/data/hub_choice.py: which files of a data set on the hub are read, by its list of files and its README."""

from __future__ import annotations

from typing import Any

import pytest

from maekit.config import UserError
from maekit.data.hub_choice import Choice, choose, what_is_there

NAME = "hub:o/n"


def listed(*paths: str, size: int = 100) -> dict[str, int]:
    return dict.fromkeys(paths, size)


def chosen(files: dict[str, int], inside: str = "", configs: Any = None) -> Choice:
    found = choose(files, {} if configs is None else {"configs": configs}, inside, NAME)
    assert found is not None
    return found


def refusal(files: dict[str, int], inside: str = "", configs: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        choose(files, {} if configs is None else {"configs": configs}, inside, NAME)
    return str(caught.value)


TWO = listed("README.md", ".gitattributes", "a/train-00000-of-00001.parquet", "a/test-00000-of-00001.parquet",
             "b/train-00000-of-00001.parquet", "b/more-00000-of-00001.parquet", "b/more.txt")  # fmt: skip
CONFIGS = [
    {
        "config_name": "small",
        "data_files": [{"split": "train", "path": "a/train-*"}, {"split": "test", "path": "a/te*"}],
    },
    {
        "config_name": "large",
        "data_files": [{"split": "train", "path": "b/train-*"}, {"split": "more", "path": "b/m*"}],
    },
]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (listed("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
         {"train": ["data/train-00000-of-00001.parquet"], "val": ["data/validation-00000-of-00001.parquet"]}),
        (listed("plain_text/train.parquet", "plain_text/test.parquet", "pictures/logo.png", "x.py"),
         {"train": ["plain_text/train.parquet"], "test": ["plain_text/test.parquet"]}),
        (listed("default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"),
         {"train": ["default/train/0000.parquet", "default/train/0001.parquet"],
          "test": ["default/test/0000.parquet"]}),
        (listed("0.parquet", "1.parquet"), {"train": ["0.parquet", "1.parquet"]}),
        (listed("data/deep/train.parquet", "data/deep/.hidden.parquet"), {"train": ["data/deep/train.parquet"]}),
    ],
)  # fmt: skip
def test_parquet_by_the_names_of_files(files: dict[str, int], parts: dict[str, list[str]]) -> None:
    assert chosen(files).parts == parts
    assert set(chosen(files).files) == {path for paths in parts.values() for path in paths}


def test_a_configuration_must_be_named() -> None:
    assert "choose --data hub:o/n/a or --data hub:o/n/b" in refusal(TWO)
    assert chosen(TWO, "a").parts == {
        "train": ["a/train-00000-of-00001.parquet"], "test": ["a/test-00000-of-00001.parquet"],
    }  # fmt: skip
    assert "several configurations; choose --data hub:o/n/small or --data hub:o/n/large" in refusal(TWO, "", CONFIGS)
    assert chosen(TWO, "small", CONFIGS).parts == chosen(TWO, "a").parts
    assert set(chosen(TWO, "small", CONFIGS).files) == {f"a/{one}-00000-of-00001.parquet" for one in ("train", "test")}
    assert "did you mean small" in refusal(TWO, "smal", CONFIGS)
    assert "did you mean a" in refusal(TWO, "aa") or "choose from a" in refusal(TWO, "aa")


def test_the_default_configuration_is_read_and_said() -> None:
    found = chosen(TWO, "", [CONFIGS[0], {**CONFIGS[1], "default": True}])
    assert found.parts == {"train": ["b/train-00000-of-00001.parquet"]}
    assert "there are others: small (--data hub:o/n/small)" in found.notes[0]
    assert chosen(TWO, "", [CONFIGS[0], {**CONFIGS[1], "config_name": "default"}]).parts == found.parts


def test_splits_of_other_names_are_left_out_and_can_be_taken_alone() -> None:
    found = chosen(TWO, "large", CONFIGS)
    assert found.parts == {"train": ["b/train-00000-of-00001.parquet"]}
    assert found.notes == ("left out: large/more (--data hub:o/n/large/more takes it alone)",)
    assert chosen(TWO, "large/more", CONFIGS).parts == {"train": ["b/more-00000-of-00001.parquet"]}
    assert chosen(TWO, "b").notes == ("left out: b/more (--data hub:o/n/b/more takes it alone)",)
    assert chosen(TWO, "b/more").parts == {"train": ["b/more-00000-of-00001.parquet"]}
    assert chosen(TWO, "b/more-00000-of-00001.parquet").parts == {"train": ["b/more-00000-of-00001.parquet"]}
    assert chosen(TWO, "small/test", CONFIGS).parts == {"train": ["a/test-00000-of-00001.parquet"]}


def test_without_a_training_split_the_others_are_named() -> None:
    files = listed("data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet")
    assert "no training split; to train on another one, choose --data hub:o/n/data/test" in refusal(files)
    assert chosen(files, "data/test").parts == {"train": sorted(files)}
    configs = [{"config_name": "default", "data_files": [{"split": "test", "path": "data/*"}]}]
    assert "choose --data hub:o/n/default/test" in refusal(files, "", configs)
    assert (
        chosen(files, "default/test", configs).parts == chosen(files, "test", configs).parts == {"train": sorted(files)}
    )
    assert chosen(listed("default/test/0000.parquet"), "default/test").parts == {"train": ["default/test/0000.parquet"]}


@pytest.mark.parametrize(
    ("data_files", "expected"),
    [
        ("*.parquet", ["x.parquet"]),
        ("./a/*.parquet", ["a/1.parquet", "a/2.parquet"]),
        (["a/1*", "b/c/?.parquet"], ["a/1.parquet", "b/c/3.parquet"]),
        ("**/*.parquet", ["a/1.parquet", "a/2.parquet", "b/c/3.parquet", "x.parquet"]),
        ("a/[!1].parquet", ["a/2.parquet"]),
        ({"train": "b/**"}, ["b/c/3.parquet"]),
        ([{"split": "train", "path": ["a/[1]*", "nothing/*"]}], ["a/1.parquet"]),
    ],
)
def test_patterns_of_a_readme(data_files: Any, expected: list[str]) -> None:
    files = listed("x.parquet", "a/1.parquet", "a/2.parquet", "b/c/3.parquet", "README.md")
    assert chosen(files, "", [{"config_name": "default", "data_files": data_files}]).parts == {"train": expected}


@pytest.mark.parametrize("configs", [3, "x", [3], [{}], [{"data_files": 4}], [{"data_files": [{"path": 5}]}], {"a": 1}])
def test_a_readme_of_another_form_is_passed_over(configs: Any) -> None:
    assert chosen(listed("train.parquet"), "", configs).parts == {"train": ["train.parquet"]}


def test_folders_of_images() -> None:
    files = listed("train/cat/1.jpg", "train/dog/2.JPG", "test/cat/3.png", "metadata.csv", "README.md", ".x/4.png")
    found = chosen(files)
    assert (found.parts, found.root) == (None, "")
    assert set(found.files) == {"train/cat/1.jpg", "train/dog/2.JPG", "test/cat/3.png", "metadata.csv"}
    assert (chosen(files, "train").root, len(chosen(files, "train").files)) == ("train", 2)
    table = chosen(files, "metadata.csv")
    assert (table.table, len(table.files)) == ("metadata.csv", 4)
    assert "one image; give its folder" in refusal(files, "train/cat/1.jpg")
    configs = [{"config_name": "a", "data_dir": "train"}, {"config_name": "b", "data_files": "test/**"}]
    assert chosen(files, "a", configs).root == "train"
    assert chosen(files, "b", configs).root == "test/cat"


def test_what_is_neither_is_left_to_the_hubs_copy() -> None:
    archives = {**listed("images.zip", size=10_000), **listed("sample.png", "cover.png")}
    assert choose(archives, {}, "", NAME) is None
    assert choose(listed("n.py", "sample.png"), {}, "", NAME) is None, "a script that fetches its images elsewhere"
    assert choose(listed("a.json"), {"configs": [{"config_name": "default", "data_files": "a.json"}]}, "", NAME) is None
    assert what_is_there(archives) == "2 .png, 1 .zip"


def test_shards_of_webdataset_and_archives_by_name() -> None:
    shards = ["in-train-0000.tar", "in-train-0001.tar", "in-validation-0000.tar"]
    files = listed("README.md", "sample.png", *shards)
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "in-train-*.tar"}]}]
    for given in (None, configs):
        assert chosen(files, configs=given) == Choice(tuple(shards), archives=True)
    assert chosen(files, "in-train-0001.tar") == Choice((shards[1],), archives=True, root=shards[1])
    nested = listed("data/train-0.tar", "data/test-0.tar", "notes.txt")
    assert chosen(nested).files == ("data/test-0.tar", "data/train-0.tar")
    assert choose(listed("load.py", "a.tar"), {}, "", NAME) is None, "what a script unpacks"
    assert choose(listed("a.tar", "b.tar.gz"), {}, "", NAME) is None, "one that cannot be read"
    assert choose(listed("images.zip", "annotations.zip"), {}, "", NAME) is None
    for way in ("images.zip", "images.zip/train/a"):
        found = chosen(listed("images.zip", "annotations.zip"), way)
        assert found == Choice(("images.zip",), archives=True, root=way)
    assert "several folders of archives, each a configuration; choose --data hub:o/n/en" in refusal(
        listed("en/0.tar", "fr/0.tar")
    )


def test_a_part_of_a_split_is_marked() -> None:
    files = listed("default/partial-train/0000.parquet", "default/test/0000.parquet")
    found = chosen(files)
    assert found.partial
    assert found.parts == {"train": ["default/partial-train/0000.parquet"], "test": ["default/test/0000.parquet"]}
    assert not chosen(listed("default/train/0000.parquet")).partial


def test_a_revision_behind_a_folder_is_told_where_it_stands() -> None:
    assert "hub:o/n@REVISION/FOLDER" in refusal(TWO, "a@main")
