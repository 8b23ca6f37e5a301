"""Sources: files, parquet, the hub when offline, `keep`, and a line for each mistake."""

import pytest

from loramoe_train.data.source import has_split, local_file, open_rows, resolve_root
from loramoe_train.errors import ConfigError, DataError, MissingFileError
from loramoe_train.paths import ASSETS
from loramoe_train.schema.data import SourceConfig
from tests.data.helpers import write_lines


def rows_of(source: dict, root=None, split="train"):
    rows = open_rows("toy", SourceConfig.model_validate(source), split, root)
    return [rows[i] for i in range(len(rows))]


def test_file_below_root_with_or_without_gz(tmp_path):
    import gzip

    (tmp_path / "toy.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert rows_of({"files": {"train": "toy.jsonl"}}, str(tmp_path)) == [{"a": 1}]
    write_lines(tmp_path / "plain.jsonl", [{"a": 2}])
    assert rows_of({"files": {"train": "plain.jsonl.gz"}}, str(tmp_path)) == [{"a": 2}]


def test_absolute_path_needs_no_root_and_wins_over_the_hub(tmp_path):
    path = write_lines(tmp_path / "toy.jsonl", [{"a": 1}])
    assert rows_of({"hub": "some/thing", "splits": {"train": "train"}, "files": {"train": str(path)}}) == [{"a": 1}]


def test_package_root():
    assert resolve_root("package://assets/tiny/data") == ASSETS / "tiny" / "data"


def test_parquet_and_its_row_numbers(tmp_path):
    from datasets import Dataset

    path = tmp_path / "toy.parquet"
    Dataset.from_list([{"a": 1, "b": {"c": ["x"]}}, {"a": 2, "b": {"c": []}}]).to_parquet(str(path))
    assert rows_of({"files": {"train": "toy.parquet"}}, str(tmp_path))[1] == {"a": 2, "b": {"c": []}}
    rows = open_rows("toy", SourceConfig(files={"train": "toy.parquet"}), "train", str(tmp_path))
    assert rows.where(1) == f"{path} (row 2)"


def test_broken_parquet(tmp_path):
    (tmp_path / "toy.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="toy.parquet: not a readable parquet file"):
        rows_of({"files": {"train": "toy.parquet"}}, str(tmp_path))


def test_keep_leaves_rows_out_and_remembers_their_place(tmp_path):
    write_lines(tmp_path / "toy.jsonl", [{"a": 1}, {"a": 2}, {"a": 3}])
    source = SourceConfig(files={"train": "toy.jsonl"}, keep="a != 2")
    rows = open_rows("toy", source, "train", str(tmp_path))
    assert [rows[0], rows[1]] == [{"a": 1}, {"a": 3}]
    assert rows.origin.tolist() == [0, 2] and rows.where(1).endswith("toy.jsonl:3")


@pytest.mark.parametrize(
    ("keep", "kind", "message"),
    [
        ("a > 5", DataError, "none of its 1 rows passes source.keep"),
        ("label == 1", DataError, "toy.jsonl:1: has no column 'label'"),
        ("a ==", ConfigError, "data.definitions.toy.source.keep='a ==': not a jinja expression"),
        ("a + 'x'", DataError, "toy.jsonl:1: data.definitions.toy.source.keep fails on this row"),
    ],
)
def test_bad_keep(tmp_path, keep, kind, message):
    write_lines(tmp_path / "toy.jsonl", [{"a": 1, "lable": 1}])
    with pytest.raises(kind) as caught:
        rows_of({"files": {"train": "toy.jsonl"}, "keep": keep}, str(tmp_path))
    assert message in str(caught.value)


def test_missing_file_names_the_file_the_neighbour_and_the_keys(tmp_path):
    write_lines(tmp_path / "toy" / "training.jsonl", [{"a": 1}])
    source = {"hub": "org/toy", "splits": {"train": "train"}, "files": {"train": "toy/train.jsonl"}}
    with pytest.raises(MissingFileError) as caught:
        rows_of(source, str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path / "toy" / "train.jsonl") in message and "did you mean 'training.jsonl'?" in message
    assert "data.root=null to load org/toy from the hub" in message and caught.value.exit_code == 3


def test_missing_root(tmp_path):
    with pytest.raises(MissingFileError, match="the folder .*nowhere.* does not exist"):
        rows_of({"files": {"train": "toy/train.jsonl"}}, str(tmp_path / "nowhere"))


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "toy.jsonl").mkdir()
    with pytest.raises(MissingFileError, match="is a folder, not a file"):
        rows_of({"files": {"train": "toy.jsonl"}}, str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "toy.jsonl").write_text(content)
    with pytest.raises(DataError, match="toy.jsonl: has no rows"):
        rows_of({"files": {"train": "toy.jsonl"}}, str(tmp_path))


def test_unknown_suffix(tmp_path):
    (tmp_path / "toy.csv").write_text("a\n1\n")
    with pytest.raises(ConfigError, match=r"source.files.train=toy.csv: unknown kind of file; give one of .json, "):
        rows_of({"files": {"train": "toy.csv"}}, str(tmp_path))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "toy.jsonl", [{"a": 1}])

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match="toy.jsonl: cannot be read .Permission denied."):
        rows_of({"files": {"train": "toy.jsonl"}}, str(tmp_path))


@pytest.mark.parametrize(
    ("source", "root", "message"),
    [
        ({}, None, "names neither hub nor files"),
        ({"files": {"train": "toy.jsonl"}}, None, "data.root is null; set it to the folder that holds toy.jsonl"),
        ({"files": {"test": "toy.jsonl"}}, "/data", "has no 'train' among its files .data.root=/data.; it has test"),
        ({"hub": "org/toy", "splits": {"test": "test"}}, None, "has no 'train' among its splits of org/toy"),
        (
            {"hub": "org/toy", "splits": {"train": "train"}, "files": {"test": "toy.jsonl"}},
            "/data",
            "without data.root it is read from org/toy",
        ),
    ],
)
def test_bad_source_keys(source, root, message):
    with pytest.raises(ConfigError, match=message):
        rows_of(source, root)


def test_offline_hub_miss_names_the_command():
    source = {"hub": "org/toy", "config": "main", "splits": {"train": "train"}, "files": {"train": "toy/train.jsonl"}}
    with pytest.raises(MissingFileError) as caught:
        rows_of(source)
    message = str(caught.value)
    assert "org/toy/main, split train" in message and "load_dataset('org/toy', 'main')" in message
    assert "data.root" in message and "toy/train.jsonl" in message and "\n" not in message


def test_hub_rows_and_unknown_split(monkeypatch):
    import datasets

    def load(name, config, split):
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].\nmore")
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of({"hub": "org/toy", "splits": {"train": "train"}}) == [{"a": 1}]
    with pytest.raises(ConfigError, match="org/toy, split training cannot be loaded .Unknown split") as caught:
        rows_of({"hub": "org/toy", "splits": {"train": "training"}})
    assert "\n" not in str(caught.value)


def test_images_stay_undecoded(monkeypatch):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "a": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": [None, {"bytes": b"xx", "path": None}], "a": [1, 2]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    # decoding the second image would fail: it is none
    assert rows_of({"hub": "org/toy", "splits": {"train": "train"}, "keep": "image is none"})[0]["a"] == 1


def test_where_a_split_is_looked_for():
    source = SourceConfig(hub="org/toy", splits={"validation": "dev"}, files={"train": "toy.jsonl"})
    assert has_split(source, "train", "/data") and not has_split(source, "validation", "/data")
    assert has_split(source, "validation", None) and not has_split(source, "train", None)
    assert local_file(source, "validation", None) is None
    assert str(local_file(source, "train", "/data")) == "/data/toy.jsonl"
