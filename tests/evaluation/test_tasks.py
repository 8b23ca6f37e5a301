"""The benchmark files load, agree with themselves, and a wrong name is refused."""

import pytest
import yaml
from jinja2 import Environment, meta

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation import listing, tasks
from loramoe_train.evaluation.tasks import known_benchmarks, load_benchmark
from loramoe_train.paths import CONFIGS

ALL = known_benchmarks()
NAMES_A_COLUMN = ("doc_to_text", "doc_to_target", "doc_to_choice")  # without a template they are a column's name
_JINJA = Environment()
_JINJA.filters["regex_replace"] = str  # lm-eval's own; only its name matters here


def test_the_promised_benchmarks_are_there():
    promised = {"gsm8k", "humaneval", "medqa_4options", "cola", "sst2", "arc_easy", "arc_challenge"}
    promised |= {"gsm8k_cot", "gsm8k_cot_zeroshot", "humaneval_instruct", "mbpp", "mbpp_instruct", "mrpc", "rte", "qqp"}
    promised |= {"boolq", "piqa", "hellaswag", "winogrande", "openbookqa", "commonsense_qa", "social_iqa", "mmlu"}
    promised |= {"arc_easy_chat", "arc_challenge_chat", "scienceqa", "agieval_aqua_rat"}
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
    benchmark = load_benchmark(name)
    task, columns = {**benchmark.task, "code": benchmark.code}, set(benchmark.columns)
    of_examples = {key for example in benchmark.examples or [] for key in example}  # asked for with `is defined`
    for key in ("description", "doc_to_text", "gen_prefix", "doc_to_target", "doc_to_choice", "code"):
        value = task.get(key)
        if isinstance(value, str):
            used = meta.find_undeclared_variables(_JINJA.parse(value)) or ({value} if key in NAMES_A_COLUMN else set())
            used -= {"response"} if key == "code" else of_examples if key == "doc_to_target" else set()
            assert used <= columns, f"{key} reads {used - columns}"


@pytest.mark.parametrize("name", ALL)
def test_the_answer_is_a_column_that_is_scored(name):
    benchmark = load_benchmark(name)
    assert benchmark.answer in benchmark.columns
    assert any(benchmark.answer in str(benchmark.task[key]) for key in ("doc_to_target", "doc_to_text"))


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match=r"'gsm8' is no known benchmark; did you mean 'gsm8k'\?.* prints them all"):
        load_benchmark("gsm8")
    with pytest.raises(ConfigError, match=r"'gsm8@5' is no known benchmark; did you mean 'gsm8k'\?"):
        load_benchmark("gsm8@5")


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


def test_a_number_of_examples_in_the_name():
    found = {number: load_benchmark(f"gsm8k@{number}") for number in (0, 2, 5)}
    assert [(made.name, made.base_name, made.fewshot_split) for made in found.values()] == [
        ("gsm8k@0", "gsm8k", None),  # no examples, no pool
        ("gsm8k@2", "gsm8k", "train"),
        ("gsm8k@5", "gsm8k", "train"),
    ]
    for number, made in found.items():
        assert made.num_fewshot(None) == made.num_fewshot(3) == number
        assert made.task == load_benchmark("gsm8k").task
    assert load_benchmark("gsm8k").shots is None
    assert load_benchmark("mbpp@0").num_fewshot(None) == 0


@pytest.mark.parametrize("name", ["gsm8k@", "gsm8k@-1", "gsm8k@five", "gsm8k@05", "gsm8k@1.5", "gsm8k@1@2", "gsm8k@٣"])
def test_what_is_no_number_of_examples(name):
    with pytest.raises(ConfigError, match="after @ comes the number of examples, as in gsm8k@5"):
        load_benchmark(name)


@pytest.mark.parametrize("name", [name for name in ALL if not load_benchmark(name).takes_examples])
@pytest.mark.parametrize("number", [0, 1])
def test_no_number_for_a_benchmark_that_takes_none(name, number):
    with pytest.raises(ConfigError, match=f"{name} takes no examples before the question; write {name}$"):
        load_benchmark(f"{name}@{number}")


def test_the_list_for_users_is_that_of_the_files():
    text = (CONFIGS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = listing.benchmark_table()
    assert table in text, "docs/evaluation.md: paste what python -m loramoe_train.evaluation.listing prints"
    lines = table.splitlines()
    assert len(lines) == len(ALL) + 2 and len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_shots_and_lengths():
    gsm8k, humaneval, cola = (load_benchmark(name) for name in ("gsm8k", "humaneval", "cola"))
    assert [gsm8k.num_fewshot(None), gsm8k.num_fewshot(0), gsm8k.num_fewshot(2)] == [5, 0, 2]
    assert [humaneval.num_fewshot(None), humaneval.num_fewshot(3)] == [0, 0]
    assert [gsm8k.new_tokens(None), humaneval.new_tokens(None), cola.new_tokens(None)] == [256, 1024, 0]
    assert [gsm8k.new_tokens(32), cola.new_tokens(32)] == [32, 0]
