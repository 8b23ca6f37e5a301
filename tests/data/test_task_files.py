"""The shipped task files: they say what lm-eval's stock tasks ask and score, and they read the real data."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from loramoe_train.data.build import build_mixture, task_rows
from loramoe_train.data.definitions import load_definitions
from loramoe_train.data.source import local_file, open_rows
from loramoe_train.data.templates import Renderer
from loramoe_train.paths import CONFIGS
from loramoe_train.schema.data import DataConfig, TaskConfig

TASKS = CONFIGS / "data" / "task"
NAMES = sorted(path.stem for path in TASKS.glob("*.yaml"))
# tasks whose stock file computes the text in Python or is another benchmark are compared by hand below
STOCK = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "cola": "glue/cola/default.yaml",
    "sst2": "glue/sst2/default.yaml",
    "mrpc": "glue/mrpc/default.yaml",
    "rte": "glue/rte/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_easy.yaml",  # arc_challenge.yaml includes it
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "mbpp": "mbpp/mbpp.yaml",
}
CHOICES = {"text": ["red", "green", "blue", "grey", "pink"], "label": ["A", "B", "C", "D", "E"]}
ROWS = {
    "gsm8k": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
    "cola": {"sentence": "He go.", "label": 0},
    "sst2": {"sentence": "fine film ", "label": 1},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1},
    "rte": {"sentence1": "a.", "sentence2": "b.", "label": 0},
    "arc_easy": {"question": "Sky?", "choices": CHOICES, "answerKey": "C"},
    "arc_challenge": {"question": "Sky?", "choices": CHOICES, "answerKey": "A"},
    "boolq": {"passage": "P.", "question": "is it", "answer": True},
    "piqa": {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
    "openbookqa": {"question_stem": "Grass is", "choices": CHOICES, "answerKey": " B"},
    "commonsense_qa": {"question": " Sky? ", "choices": CHOICES, "answerKey": "C"},
    "mbpp": {"text": "Add.", "code": "def f():\r\n  pass", "test_list": ["t1", "t2", "t3"]},
    "medqa": {"question": "Q?", "options": dict(zip("ABCD", "wxyz", strict=True)), "answer_idx": "B", "answer": "x"},
    "winogrande": {"sentence": "Ann thanked Sue as _ had won.", "option1": "Ann", "option2": "Sue", "answer": "2"},
}


def definition(name):
    return TaskConfig.model_validate(load_definitions([name], [TASKS])[name])


def render(name, row):
    prompt, answer = Renderer(name, definition(name), None)(row, "row").segments
    return prompt.text, answer.text


def stock_folder():
    return Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"


def stock_yaml(path):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    return yaml.load(path.read_text(), Loader)  # noqa: S506 (a SafeLoader)


def stock_text(name, row):
    """(prompt, right choice or target) as lm-eval renders a row of its data set, target delimiter included."""
    from jinja2 import Environment, StrictUndefined

    stock = stock_yaml(stock_folder() / STOCK[name])
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    if name == "boolq":
        row = row | {"label": int(row["answer"])}  # the column of the data set that lm-eval takes
    if name == "mbpp":
        row = row | {"is_fewshot": True}  # the shots show what an answer looks like

    def field(template):
        return row[template] if template in row else environment.from_string(template).render(row)

    target, choices = field(stock["doc_to_target"]), stock.get("doc_to_choice")
    if isinstance(choices, str):
        choices = environment.compile_expression(choices.strip("{} "))(row)
    if choices and name != "commonsense_qa":
        target = choices[int(target)]
    return field(stock["doc_to_text"]), stock.get("target_delimiter", " ") + target


@pytest.mark.parametrize("name", sorted(STOCK))
def test_prompt_and_answer_are_lm_evals(name):
    assert render(name, ROWS[name]) == stock_text(name, ROWS[name])


def stock_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, stock_folder() / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_medqa_is_lm_evals():
    row, stock = ROWS["medqa"], stock_module(Path("medqa/preprocess_medqa.py"))
    doc = {"sent1": row["question"], **{f"ending{i}": row["options"][c] for i, c in enumerate("ABCD")}, "label": 1}
    assert render("medqa", row) == (stock.doc_to_text(doc), " " + "ABCD"[stock.doc_to_target(doc)])


def test_winogrande_is_lm_evals():
    row, stock = ROWS["winogrande"], stock_module(Path("winogrande/preprocess_winogrande.py"))
    right = stock.doc_to_choice(row)[stock.doc_to_text(row)]
    assert render("winogrande", row) == (right, " " + stock.doc_to_target(row))


def test_a_rendered_instruction_set_row():
    row = {"instruction": "Add.", "input": "", "output": "a + b"}
    assert render("code_alpaca", row) == ("### Instruction:\nAdd.\n\n### Response:\n", "a + b")
    assert definition("code_alpaca").domain == definition("new_codealpaca").domain == "code"


def test_scienceqa():
    row = {"image": None, "question": "Which?", "choices": ["up", "down"], "answer": 1, "hint": "Look."}
    assert render("scienceqa", row) == ("Look.\nQuestion: Which?\nA. up\nB. down\nAnswer:", " B")
    assert render("scienceqa", row | {"hint": ""})[0] == "Question: Which?\nA. up\nB. down\nAnswer:"


@pytest.mark.parametrize("name", NAMES)
def test_every_task_file_is_a_task(name):
    task = definition(name)
    assert task.source.splits or task.source.files
    assert task.domain and set(task.source.splits) | set(task.source.files) >= {"train"}


def test_arc_is_one_domain():
    assert definition("arc_easy").domain == definition("arc_challenge").domain == "arc"


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny_")])
def test_real_rows_render(name, shared_dir):
    task, root = definition(name), str(shared_dir / "data")
    renderer = Renderer(name, task, None)
    seen = 0
    for split in task.source.files:
        path = local_file(task.source, split, root)
        if not path.exists():
            continue
        rows = open_rows(name, task.source, split, root)
        for index in range(min(len(rows), 200)):
            prompt, answer = renderer(rows[index], rows.where(index)).segments
            assert answer.text.strip() and (prompt.text.strip() or name == "text")
            if name in STOCK:
                assert (prompt.text, answer.text) == stock_text(name, rows[index]), rows.where(index)
        seen += 1
    assert seen, f"no file of {name} below {root}"


@pytest.mark.real
def test_the_seven_on_real_data(shared_dir, tokenizer):
    plain = yaml.safe_load((CONFIGS / "data" / "lora_mixer_seven.yaml").read_text())
    plain |= {"root": str(shared_dir / "data"), "definitions": load_definitions(plain["tasks"], [TASKS])}
    config = DataConfig.model_validate(plain)
    mixture = build_mixture(config, tokenizer, seed=0)  # renders all 88,000 rows
    assert mixture.domain_names == ("medqa", "cola", "sst2", "gsm8k", "arc", "code")
    assert mixture.sizes["gsm8k"] == 7473 - 64 and mixture.sizes["code_alpaca"] == 2017 - 2 - 64
    assert {note.split()[0] for note in mixture.notes} == {"gsm8k", "code_alpaca"}
    assert all(len(task_rows(config, name, "validation")[0]) == 64 for name in config.tasks)
