"""The benchmark files load, agree with themselves, and a wrong name is refused."""

import pytest
import yaml

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation import tasks
from loramoe_train.evaluation.tasks import known_benchmarks, load_benchmark

ALL = known_benchmarks()


def test_the_promised_benchmarks_are_there():
    promised = {"gsm8k", "humaneval", "medqa_4options", "cola", "sst2", "arc_easy", "arc_challenge"}
    promised |= {"tiny_math", "tiny_code", "tiny_facts", "tiny_grammar", "tiny_sentiment"}
    assert promised <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_headline_is_a_metric_and_filter_of_the_definition(name):
    benchmark = load_benchmark(name)
    metric, filter_name = benchmark.headline.split(",")
    listed = {entry["metric"]: entry for entry in benchmark.task["metric_list"]}
    assert listed[metric]["higher_is_better"] is True
    filters = [entry["name"] for entry in benchmark.task.get("filter_list", [{"name": "none"}])]
    assert benchmark.executes_code or filter_name in filters


@pytest.mark.parametrize("name", ALL)
def test_every_benchmark_has_exactly_one_source_without_local_files(name):
    benchmark = load_benchmark(name)
    assert (benchmark.hub is None) != (benchmark.embedded is None)


@pytest.mark.parametrize("name", ALL)
def test_every_column_that_a_template_reads_is_required(name):
    """A template over a column that is not required would fail in the middle of a run."""
    from jinja2 import Environment, meta

    benchmark = load_benchmark(name)
    task, columns = {**benchmark.task, "code": benchmark.code}, set(benchmark.columns)
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "code"):
        value = task.get(key)
        if isinstance(value, str):
            used = meta.find_undeclared_variables(Environment().parse(value)) or {value}
            used -= {"response"} if key == "code" else set()
            assert used <= columns, f"{key} reads {used - columns}"


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match=r"'gsm8' is no known benchmark; did you mean 'gsm8k'\?"):
        load_benchmark("gsm8")


def test_names_that_leave_the_folder_are_unknown():
    with pytest.raises(ConfigError, match="no known benchmark"):
        load_benchmark("../tasks/gsm8k")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"headlin": "acc,none"}, "headlin"),
        ({"files": {"train": "x"}}, "lacks the split 'test'"),
        ({"task": 3}, "task"),
    ],
)
def test_malformed_definition_is_one_line(tmp_path, monkeypatch, change, complaint):
    good = yaml.safe_load((tasks.FOLDER / "gsm8k.yaml").read_text())
    (tmp_path / "gsm8k_broken.yaml").write_text(yaml.safe_dump({**good, **change}))
    monkeypatch.setattr(tasks, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_benchmark("gsm8k_broken")
    assert "\n" not in str(caught.value)


def test_shots_and_lengths():
    gsm8k, humaneval, cola = (load_benchmark(name) for name in ("gsm8k", "humaneval", "cola"))
    assert [gsm8k.num_fewshot(None), gsm8k.num_fewshot(0), gsm8k.num_fewshot(2)] == [5, 0, 2]
    assert [humaneval.num_fewshot(None), humaneval.num_fewshot(3)] == [0, 0]
    assert [gsm8k.new_tokens(None), humaneval.new_tokens(None), cola.new_tokens(None)] == [256, 1024, 0]
    assert [gsm8k.new_tokens(32), cola.new_tokens(32)] == [32, 0]
