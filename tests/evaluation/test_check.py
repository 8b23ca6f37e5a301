"""What is refused before a model is loaded, each in one line."""

import gzip
import json
import shlex
import subprocess
import sys

import pytest

from loramoe_train import paths
from loramoe_train.errors import ConfigError, DataError, LoramoeError, MissingFileError
from loramoe_train.evaluation import check, sandbox
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.sandbox import levels
from loramoe_train.schema.evaluation import EvalConfig
from tests.evaluation.rows import LOCAL, write_local


def refused(kind, *arguments, **config) -> str:
    names, root, *rest = arguments
    with pytest.raises(LoramoeError) as caught:
        check_benchmarks(names, EvalConfig(**config), None if root is None else str(root), *rest)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def test_settles_files_shots_and_lengths(tmp_path):
    write_local(tmp_path, "gsm8k", LOCAL["gsm8k"] * 2)
    write_local(tmp_path, "cola")
    selection = check_benchmarks(["gsm8k", "cola"], EvalConfig(), str(tmp_path), 1024)
    gsm8k, cola = selection.planned
    # the file says .gz and the folder has the plain one
    assert gsm8k.files == {"test": tmp_path / "gsm8k" / "test.jsonl", "train": tmp_path / "gsm8k" / "train.jsonl"}
    assert (gsm8k.num_fewshot, gsm8k.new_tokens) == (5, 256)
    assert (list(cola.files), cola.num_fewshot, cola.new_tokens) == (["validation"], 0, 0)
    assert selection.skipped == {}


def test_unknown_benchmark():
    assert "'colla' is no known benchmark; did you mean 'cola'?" in refused(ConfigError, ["colla"], None)


def test_an_empty_list():
    assert "eval.tasks=[] names nothing to evaluate" in refused(ConfigError, [], None, tasks=[])
    assert check_benchmarks([], EvalConfig(), None).planned == ()  # a mixture whose tasks have no benchmark


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["gsm8k", "cola", "gsm8k"], "gsm8k is named twice"),
        (["gsm8k@2", "gsm8k@2"], "gsm8k@2 is named twice"),
        (["gsm8k@5", "gsm8k"], "gsm8k@5 and gsm8k are the same: 5 examples each"),
    ],
)
def test_a_benchmark_named_twice(tmp_path, names, complaint):
    for name in ("gsm8k", "cola"):
        write_local(tmp_path, name, LOCAL[name] * 2)
    assert f"eval.tasks: {complaint}; leave one out" in refused(ConfigError, names, tmp_path)


def test_one_benchmark_with_several_numbers_of_examples(tmp_path):
    write_local(tmp_path, "gsm8k", LOCAL["gsm8k"] * 2)
    names = ["gsm8k@0", "gsm8k@2", "gsm8k"]
    planned = check_benchmarks(names, EvalConfig(num_fewshot=4), str(tmp_path)).planned
    assert [(entry.benchmark.name, entry.num_fewshot, len(entry.files)) for entry in planned] == [
        ("gsm8k@0", 0, 1),  # without examples the pool is not looked for
        ("gsm8k@2", 2, 2),
        ("gsm8k", 4, 2),
    ]


def test_code_is_skipped_unless_allowed(tmp_path):
    selection = check_benchmarks(["humaneval"], EvalConfig(), str(tmp_path))
    assert selection.planned == () and "eval.allow_code_execution=true" in selection.skipped["humaneval"]


def test_code_that_nothing_can_contain_is_refused(tmp_path, monkeypatch):
    write_local(tmp_path, "humaneval")
    sandbox.detect.cache_clear()
    monkeypatch.setattr(levels, "probe", lambda made: "no")
    try:
        message = refused(ConfigError, ["humaneval"], tmp_path, allow_code_execution=True)
    finally:
        sandbox.detect.cache_clear()
    assert "install bubblewrap" in message


def test_missing_file_names_it_and_the_command(tmp_path):
    message = refused(MissingFileError, ["gsm8k"], tmp_path)
    assert f"{tmp_path / 'gsm8k' / 'test.jsonl'} is not there" in message
    assert "load_dataset('openai/gsm8k', 'main', split='test')" in message


@pytest.mark.parametrize("name", ["gsm8k", "boolq", "medqa_4options", "scienceqa"])
def test_the_named_command_really_cures_it(tmp_path, monkeypatch, name):
    """Run what the message says, with the download replaced by rows in memory."""
    import datasets

    asked = []

    def rows_in_memory(*source: str, split: str) -> datasets.Dataset:
        asked.append((*source, split))
        return datasets.Dataset.from_list(LOCAL[name])

    monkeypatch.setattr(datasets, "load_dataset", rows_in_memory)
    config = {"num_fewshot": 1}
    for _ in range(2):
        message = refused(MissingFileError, [name], tmp_path, **config)
        command = shlex.split(message.split("fetch it with: ")[1])
        assert command[:2] == ["python", "-c"]
        exec(command[2], {})
    (planned,) = check_benchmarks([name], EvalConfig(**config), str(tmp_path)).planned
    assert len(planned.files) == 2 and [entry[-1] for entry in asked] == [planned.benchmark.split, "train"]
    source = planned.benchmark.same_columns or planned.benchmark.hub
    assert {entry[:-1] for entry in asked} == {
        (source.name,) if source.config is None else (source.name, source.config)
    }


def test_missing_pool_only_matters_with_examples(tmp_path):
    write_local(tmp_path, "piqa")
    (tmp_path / "piqa" / "train.jsonl").unlink()
    assert len(check_benchmarks(["piqa"], EvalConfig(), str(tmp_path)).planned) == 1
    assert "piqa/train.jsonl is not there" in refused(MissingFileError, ["piqa"], tmp_path, num_fewshot=2)


def test_embedded_families_ship_with_the_package(tmp_path):
    message = refused(MissingFileError, ["tiny_math"], tmp_path)
    assert "data.root=package://assets/tiny/data" in message and "load_dataset" not in message


def test_package_root_and_null_root_find_the_embedded_rows(tmp_path, monkeypatch):
    write_local(tmp_path / "assets" / "tiny" / "data", "tiny_facts")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    for root in ("package://assets/tiny/data", None):
        (planned,) = check_benchmarks(["tiny_facts"], EvalConfig(), root).planned
        assert planned.files == {"test": tmp_path / "assets" / "tiny" / "data" / "tiny_facts" / "test.jsonl"}


def test_offline_without_local_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    message = refused(MissingFileError, ["sst2"], None)
    assert message.endswith("""python -c "from datasets import load_dataset; load_dataset('nyu-mll/glue', 'sst2')\"""")
    (tmp_path / "datasets" / "nyu-mll___glue").mkdir(parents=True)
    assert check_benchmarks(["sst2"], EvalConfig(), None).planned[0].files is None


def test_online_without_local_files_is_the_hub(monkeypatch):
    monkeypatch.setattr(check, "is_offline", lambda: False)
    (planned,) = check_benchmarks(["gsm8k"], EvalConfig(), None).planned
    assert planned.files is None and planned.num_fewshot == 5


def test_more_shots_than_the_pool(tmp_path):
    write_local(tmp_path, "gsm8k")
    assert check_benchmarks(["gsm8k"], EvalConfig(num_fewshot=3), str(tmp_path)).planned
    message = refused(ConfigError, ["gsm8k"], tmp_path, num_fewshot=4)
    assert "eval.num_fewshot=4" in message and "has 3 rows" in message
    assert "gsm8k@4 is more than gsm8k can draw" in refused(ConfigError, ["gsm8k@4"], tmp_path)


@pytest.mark.parametrize("root", ["local", None])
def test_more_shots_than_a_definition_brings_along(tmp_path, monkeypatch, root):
    monkeypatch.setattr(check, "is_offline", lambda: False)
    root = root and write_local(tmp_path, "gsm8k_cot")
    assert check_benchmarks(["gsm8k_cot@8"], EvalConfig(), root and str(root)).planned[0].num_fewshot == 8
    message = refused(ConfigError, ["gsm8k_cot"], root, num_fewshot=9)
    assert message == "eval.num_fewshot=9 is more than gsm8k_cot can show: its definition has 8 examples"
    assert "gsm8k_cot@9 is more than" in refused(ConfigError, ["gsm8k_cot@9"], root)


def test_pool_that_lends_one_example_more(tmp_path):
    """lm-eval draws n + 1 for definitions without a test split, to be able to leave out the document itself."""
    write_local(tmp_path, "cola")
    assert check_benchmarks(["cola"], EvalConfig(num_fewshot=2), str(tmp_path)).planned
    assert "the document itself is left out" in refused(ConfigError, ["cola"], tmp_path, num_fewshot=3)


def test_lengths_that_the_model_cannot_hold(tmp_path):
    for name in ("gsm8k", "cola"):
        write_local(tmp_path, name, LOCAL[name] * 2)
    assert "gsm8k generates up to 256 tokens, but the model holds 256" in refused(ConfigError, ["gsm8k"], tmp_path, 256)
    assert "set eval.max_new_tokens below 100" in refused(ConfigError, ["gsm8k"], tmp_path, 4096, max_length=100)
    assert "eval.max_length=512 is more than the model's 256" in refused(
        ConfigError, ["cola"], tmp_path, 256, max_length=512
    )
    assert check_benchmarks(["gsm8k"], EvalConfig(max_new_tokens=255), str(tmp_path), 256).planned[0].new_tokens == 255
    assert check_benchmarks(["cola"], EvalConfig(), str(tmp_path), 16).planned  # likelihoods generate nothing


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"sentence": "x", "label": 1', r"validation.jsonl:1: not valid JSON"),
        ("[1, 2]", r"validation.jsonl:1: expected a JSON object with the columns sentence, label"),
        ('\n{"text": "x", "label": 1}', r"validation.jsonl:2: no column 'sentence'.*found text, label"),
        (
            '{"sentence": "x", "label": 1}\n{"sentence": "y", "label": -1}',
            r"jsonl:2: label is -1, so the answer",
        ),
        ("\n\n", "holds no rows"),
    ],
)
def test_malformed_files(tmp_path, text, complaint):
    write_local(tmp_path, "cola")
    path = tmp_path / "glue_cola" / "validation.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=complaint):
        check_benchmarks(["cola"], EvalConfig(), str(tmp_path))


def test_gzipped_files_and_broken_ones(tmp_path):
    folder = tmp_path / "sst2"
    folder.mkdir()
    path = folder / "validation.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in LOCAL["sst2"])))
    assert check_benchmarks(["sst2"], EvalConfig(), str(tmp_path)).planned[0].files == {"validation": path}
    path.write_bytes(path.read_bytes()[:20])
    assert "cannot be read" in refused(DataError, ["sst2"], tmp_path)


def test_stays_light():
    """The CLI calls it before it loads a model; it must not cost the seconds that torch and lm-eval take to import."""
    program = "import sys, loramoe_train.evaluation.check\n"
    program += "print([name for name in ('torch', 'lm_eval', 'datasets', 'transformers') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.real
def test_real_folder_serves_every_benchmark(shared_dir):
    from loramoe_train.evaluation.tasks import known_benchmarks, load_benchmark

    known = [load_benchmark(name) for name in known_benchmarks() if not name.startswith("tiny_")]
    names = [benchmark.name for benchmark in known if benchmark.checked_on == "real rows"]
    config = EvalConfig(allow_code_execution=True)
    selection = check_benchmarks(names, config, str(shared_dir / "data"))
    assert [planned.benchmark.name for planned in selection.planned] == names and len(names) > 20
