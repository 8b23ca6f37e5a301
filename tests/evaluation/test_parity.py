"""Our scores of a model folder against those of lm-eval's own command line, item by item, on its stock definitions."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lm_eval_cli import agreement, run_cli, write_tasks
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.harness import evaluate
from loramoe_train.schema.evaluation import EvalConfig
from tests.evaluation.rows import write_local

THINGS = ("apples", "foxes", "dogs", "lazy brown pens", "yes", "a", "numbers of people")
QUESTIONS = [
    {"question": f"Tom has {n} {thing} and buys {n + 1} more. How many?", "answer": f"{n} + {n + 1}\n#### {2 * n + 1}"}
    for n, thing in enumerate(THINGS)
]
CHOICES = [
    {
        "id": str(n),
        "question": f"Which {thing} jump over the dog, {'again and ' * n} again?",
        "choices": {
            "text": [f"the quick {thing}", thing, "3 + 4", "a dog sleeps"][: 3 + n % 2],
            "label": [*"ABCD"][: 3 + n % 2],
        },
        "answerKey": "ABC"[n % 3],
    }
    for n, thing in enumerate(THINGS)
]
SENTENCES = [{"sentence": f"The {thing} jumps.", "label": n % 2, "idx": n} for n, thing in enumerate(THINGS)]
EXAMS = [
    {"question": f"Tom has {thing}?", "options": dict(A="x", B=thing, C="z", D="w"), "answer_idx": "ABCD"[n % 4]}
    for n, thing in enumerate(THINGS)
]
# generation with examples and two filters; answers of several tokens, with examples; of one; other columns on the hub
ROWS = {"gsm8k": QUESTIONS, "arc_easy": CHOICES, "sst2": SENTENCES, "medqa_4options": EXAMS}


@pytest.mark.slow
def test_base_scores_equal_those_of_the_command_line(tiny_model_dir, tmp_path):
    data, tasks = tmp_path / "data", tmp_path / "tasks"
    tasks.mkdir()
    for name, rows in ROWS.items():
        write_local(data, name, rows * 2)  # it takes two of a split that is scored
    for path in data.rglob("*.jsonl"):
        if path.name != "train.jsonl":
            path.write_text("".join(path.with_name("train.jsonl").read_text().splitlines(keepends=True)[: len(THINGS)]))
    # an odd batch size, and ours another one: batches and the rounding in them are not the same
    config = EvalConfig(num_fewshot=2, max_new_tokens=24, limit=6, generation_batch_size=4)
    planned = check_benchmarks(list(ROWS), config, str(data)).planned
    theirs = run_cli(tiny_model_dir, planned, write_tasks(tasks, planned), limit=6, batch_size=3, device="cpu")

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ours = evaluate(model, tokenizer, list(ROWS), config=config, data_root=str(data), seed=0)
    for name, result in ours.items():
        found = agreement(result.samples, theirs.samples[name])
        assert found.documents == 6 and found.unequal == 0, name
        assert found.likelihoods + found.texts >= 6
        assert found.largest < 1e-4  # float32 sums of other batches; the values are near -20
        shared = [key for key in result.metrics if key in theirs.results[name]]
        assert shared == list(result.metrics) and found.metrics == 6 * len(shared)
        for key in shared:
            assert result.metrics[key] == pytest.approx(theirs.results[name][key], abs=1e-12)
    assert {sample["prompt"].count("Question:") for sample in ours["gsm8k"].samples} == {3}
    assert len({sample["responses"][0] for sample in ours["gsm8k"].samples}) > 1
