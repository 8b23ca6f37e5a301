"""Whose examples a benchmark asks about: found, mapped, refused; and evaluation is answered by that task's experts."""

import json

import pytest
from accelerate import Accelerator

from loramoe_train.errors import ConfigError, DataError
from loramoe_train.evaluation.harness import evaluate
from loramoe_train.experts.adapters import save_adapter
from loramoe_train.models import load_tokenizer
from loramoe_train.run import build_routed, evaluate_routed
from loramoe_train.serving import check_same_origins, origins_asked, served_by
from loramoe_train.settle import settle
from tests.composing import composed

TASKS = ("tiny_grammar", "tiny_sentiment")
TWO = (f"data.tasks=[{','.join(TASKS)}]",)


def test_what_routing_asks_for():
    assert origins_asked(composed("+recipe=moelora_task")) == {"task"}
    assert origins_asked(composed("+recipe=lora_per_task", "router.make.origin=domain")) == {"domain"}
    assert origins_asked(composed("+recipe=lora_mixer")) == set()
    hard = "trainer.stages={experts: {train: [experts], routing: by_domain}}"
    assert origins_asked(composed("+recipe=lora_mixer", hard)) == {"domain"}


def found(config, *benchmarks):
    domains = list(dict.fromkeys(config.data.definitions[task].domain or task for task in config.data.tasks))
    return served_by(config, benchmarks, tasks=config.data.tasks, domains=domains)


@pytest.mark.parametrize(
    ("tasks", "domains", "words"),
    [(TASKS, TASKS[:1], "the domain tiny_sentiment of the task"), (("tiny_facts",), TASKS, "a task tiny_facts")],
)
def test_a_manifest_that_does_not_fit_its_config(tasks, domains, words):
    with pytest.raises(DataError, match=f"{words}.* is in one of them only"):
        served_by(composed("+recipe=lora", *TWO), ["tiny_grammar"], tasks=tasks, domains=domains)


def test_the_task_that_names_a_benchmark_answers_it():
    config = composed("+recipe=moelora_task", *TWO)
    assert found(config, *reversed(TASKS)) == {
        "tiny_sentiment": {"task": 1, "domain": 1},
        "tiny_grammar": {"task": 0, "domain": 0},
    }
    mapped = composed("+recipe=moelora_task", *TWO, "eval.serve_as={tiny_math: tiny_sentiment}")
    assert found(mapped, "tiny_math") == {"tiny_math": {"task": 1, "domain": 1}}
    assert found(composed("+recipe=lora", *TWO), "tiny_math") == {"tiny_math": {"task": None, "domain": None}}


def test_whoever_answers_a_benchmark_answers_it_after_examples():
    config = composed("+recipe=moelora_task", *TWO, "eval.tasks=[tiny_grammar@0,tiny_grammar@2]")
    assert config.eval.tasks == ["tiny_grammar@0", "tiny_grammar@2"]
    assert found(config, *config.eval.tasks) == dict.fromkeys(config.eval.tasks, {"task": 0, "domain": 0})
    mapped = composed(
        "+recipe=moelora_task", *TWO, "eval.serve_as={tiny_math: tiny_sentiment, tiny_math@1: tiny_grammar}"
    )
    answered = found(mapped, "tiny_math", "tiny_math@1", "tiny_math@2")
    assert [entry["task"] for entry in answered.values()] == [1, 0, 1]


def test_several_tasks_of_one_benchmark():
    code = "data.tasks=[code_alpaca,new_codealpaca]"
    with pytest.raises(ConfigError, match="code_alpaca and new_codealpaca name it; give eval.serve_as.humaneval=TASK"):
        found(composed("+recipe=moelora_task", code), "humaneval")
    config = composed("+recipe=moelora_task", code, "router.make.score.origin=domain")
    assert found(config, "humaneval") == {"humaneval": {"task": None, "domain": 0}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.tasks=[tiny_math]", "tiny_math: routing depends on the task here, and no task of data.tasks names it"),
        ("eval.serve_as={tiny_mat: tiny_grammar}", "eval.serve_as: 'tiny_mat' is no benchmark.*tiny_math"),
        ("eval.serve_as={tiny_math: tiny_gramar}", "eval.serve_as.tiny_math=tiny_gramar: no such task.*tiny_grammar"),
    ],
)
def test_refusals_come_before_anything_is_loaded(override, message):
    with pytest.raises(ConfigError, match=message):
        settle(composed("+recipe=moelora_task", *TWO, override), check_files=False)


def test_weights_of_other_tasks_are_no_start():
    config, domains = composed("+recipe=moelora_task", *TWO), ["a"]
    check_same_origins(config, {"tasks": TASKS, "domains": ["b"]}, "init_from=x", tasks=TASKS, domains=domains)
    manifest = {"tasks": TASKS[::-1], "domains": domains}
    with pytest.raises(ConfigError, match="init_from=x was trained on the tasks tiny_sentiment, tiny_grammar"):
        check_same_origins(config, manifest, "init_from=x", tasks=TASKS, domains=domains)
    check_same_origins(composed("+recipe=lora", *TWO), manifest, "init_from=x", tasks=TASKS, domains=domains)


def test_benchmarks_are_answered_by_their_own_tasks_experts(tmp_path):
    """Likelihoods equal those of a model that serves that one task by hand, and differ from the other task's."""
    config = composed("+recipe=lora_per_task", *TWO, "experts.rank=2", "eval.limit=2", "eval.base=false")
    routed = build_routed(config, TASKS, device="cpu")
    for layer in routed.layers.values():
        layer.bank.up.data.normal_(0, 0.05)
    tokenizer = load_tokenizer(config.model)
    served = found(config, *TASKS)
    accelerator = Accelerator(cpu=True)
    save_adapter(tmp_path, routed.tensors(), routed.plan, {})
    evaluate_routed(config, routed, tokenizer, tmp_path, accelerator, None, served=served, adapter=tmp_path)
    for index, name in enumerate(TASKS):
        (path,) = (tmp_path / "samples").glob(f"*{name}*.jsonl")
        ours = [json.loads(line)["log_likelihoods"] for line in path.read_text().splitlines()]
        for task in range(2):
            with routed.context.serving(task=task):
                options = {"config": config.eval, "data_root": config.data.root, "seed": 0}
                result = evaluate(routed.model, tokenizer, [name], **options)[name]
            assert (ours == [sample["log_likelihoods"] for sample in result.samples]) == (task == index)
