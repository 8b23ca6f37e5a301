"""`evaluate` and `compare` on tiny random models, against slow twins; what they leave behind; what they refuse."""

import copy
import json
import logging
import random
import subprocess
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from loramoe_train.errors import ConfigError, DataError, MissingFileError, OutOfMemoryError
from loramoe_train.evaluation.harness import compare, evaluate
from loramoe_train.evaluation.statistics import standard_error
from loramoe_train.schema.evaluation import EvalConfig
from tests.conftest import ROOT, make_llama
from tests.evaluation import reference
from tests.evaluation.rows import LOCAL, write_local

MANY = [
    {"sentence": f"{who} {verb} the {thing}.", "label": (len(who) + len(thing)) % 2, "idx": 0}
    for who in ("Tom", "A dog", "She")
    for verb in ("sees", "buys")
    for thing in ("apple", "fox", "lazy dog")
]


@pytest.fixture
def root(tmp_path):
    for name in ("tiny_grammar", "tiny_facts", "tiny_math", "tiny_code", "gsm8k"):
        write_local(tmp_path, name)
    path = tmp_path / "cola"
    write_local(path, "cola", MANY)
    (path / "glue_cola" / "validation.jsonl").write_text((path / "glue_cola" / "train.jsonl").read_text())
    return tmp_path


def run(model: Any, tokenizer: Any, names: list[str], root: Any, **config: Any) -> Any:
    settings = {"batch_size": 3, "generation_batch_size": 2, "max_new_tokens": 12, **config}
    return evaluate(model, tokenizer, names, config=EvalConfig(**settings), data_root=str(root), seed=0)


def test_likelihoods_equal_the_slow_twin(model, tokenizer, root):
    result = run(model, tokenizer, ["cola"], root / "cola")["cola"]
    slow = reference.in_float64(model)
    right, pairs = [], []
    for row, sample in zip(MANY, result.samples, strict=True):
        prompt = f"{row['sentence']}\nQuestion: Does this sentence make sense?\nAnswer:"
        assert sample["prompt"] == prompt
        expected = [reference.log_likelihood(slow, tokenizer, prompt, answer) for answer in (" no", " yes")]
        assert sample["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        pick = expected.index(max(expected))
        right.append(float(pick == row["label"]))
        pairs.append([row["label"], pick])
        assert sample["metrics"] == {"acc,none": right[-1], "mcc,none": pairs[-1]}
    assert result.score == result.metrics["acc,none"] == pytest.approx(np.mean(right))
    assert result.stderr == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)
    assert result.stderrs["mcc,none"] == standard_error(pairs, "mcc")
    assert (result.n, result.num_fewshot, result.metric, result.version) == (len(MANY), 0, "acc,none", "1.0")


@pytest.mark.parametrize("name", ["tiny_facts", "tiny_grammar"])
def test_choice_of_answer_texts_equals_the_slow_twin(model, tokenizer, root, name):
    result = run(model, tokenizer, [name], root)[name]
    slow = reference.in_float64(model)
    for sample in result.samples:
        expected = [
            reference.log_likelihood(slow, tokenizer, sample["prompt"], text) for text in sample["continuations"]
        ]
        assert sample["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        best = expected.index(max(expected))
        assert sample["metrics"]["acc,none"] == float(best == sample["target"])


@pytest.mark.parametrize(("name", "stops"), [("tiny_math", ["Question:"]), ("tiny_code", ["\ndef", "\n#", "\nclass"])])
def test_cached_batched_generation_equals_the_slow_twin(model, tokenizer, root, name, stops):
    result = run(model, tokenizer, [name], root, max_new_tokens=20)[name]
    slow = reference.in_float64(model)
    for sample in result.samples:
        expected = reference.generate(slow, tokenizer, sample["prompt"], stops=stops, new_tokens=20)
        assert sample["responses"] == [expected]


def test_cached_logits_equal_uncached_token_by_token(model, tokenizer):
    model.eval()
    ids = torch.tensor([tokenizer.encode("The quick brown fox jumps over the lazy dog")])
    cache, cached = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cached.append(out.logits[0, 0])
        whole = model(ids, use_cache=False).logits[0]
    torch.testing.assert_close(torch.stack(cached), whole, atol=1e-4, rtol=1e-4)


def test_few_shot_examples_come_from_the_pool_and_do_not_depend_on_the_seed(model, tokenizer, root):
    config = EvalConfig(num_fewshot=2, max_new_tokens=4)
    prompts = []
    for seed in (0, 1):
        result = evaluate(model, tokenizer, ["gsm8k"], config=config, data_root=str(root), seed=seed)["gsm8k"]
        prompts.append([sample["prompt"] for sample in result.samples])
        assert (result.num_fewshot, result.fewshot_seed) == (2, 1234)
    assert prompts[0] == prompts[1]
    answers = [row["answer"] for row in LOCAL["gsm8k"]]
    for prompt, row in zip(prompts[0], LOCAL["gsm8k"][:2], strict=True):
        assert prompt.endswith(f"\n\nQuestion: {row['question']}\nAnswer:")
        assert sum(f"Answer: {answer}\n\n" in prompt for answer in answers) == 2


def test_model_tokenizer_and_random_states_come_back_as_they_were(model, plain_tokenizer, root):
    plain_tokenizer.pad_token = None
    plain_tokenizer.padding_side = "right"
    model.model.layers[0].eval()  # a mixed state: .train() on the whole model would lose it
    model.model.embed_tokens.weight.requires_grad_(False)
    model.generation_config.temperature = 0.7
    flags = {name: module.training for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    generation, use_cache = copy.deepcopy(model.generation_config), model.config.use_cache
    logger_level = logging.getLogger("lm_eval").level
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    run(model, plain_tokenizer, ["tiny_grammar", "tiny_math"], root)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))
    assert {name: module.training for name, module in model.named_modules()} == flags
    for name, parameter in model.named_parameters():
        identity, requires_grad, value = parameters[name]
        assert (id(parameter), parameter.requires_grad) == (identity, requires_grad)
        assert torch.equal(parameter, value)
    assert model.generation_config.to_dict() == generation.to_dict()
    assert model.config.use_cache == use_cache
    assert (plain_tokenizer.pad_token, plain_tokenizer.padding_side) == (None, "right")
    assert logging.getLogger("lm_eval").level == logger_level
    # what the evaluation left in the modules must still serve in training
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_model_comes_back_after_an_error_too(model, tokenizer, root, monkeypatch):
    monkeypatch.setattr("loramoe_train.evaluation.harness.run_lm_eval", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, tokenizer, ["tiny_grammar"], root)
    assert all(module.training for module in model.modules())


def test_dropout_is_off_while_scoring(model, tokenizer, root):
    first, second = (run(model, tokenizer, ["cola"], root / "cola")["cola"] for _ in range(2))
    assert [s["log_likelihoods"] for s in first.samples] == [s["log_likelihoods"] for s in second.samples]


@contextmanager
def shifted(model: Any):
    """A stand-in for switching an adapter off: other weights for a while."""
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.copy_(before.flip(0))
    try:
        yield
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(before)


def test_compare_scores_both_sides_on_the_same_prompts(model, tokenizer, root):
    seen: list[tuple[str, Any]] = []
    config = EvalConfig(num_fewshot=1, max_new_tokens=4)
    outcome = compare(
        model,
        tokenizer,
        ["cola", "humaneval"],
        config=config,
        data_root=str(root / "cola"),
        seed=0,
        base_mode=lambda: shifted(model),
        on_result=lambda side, result: seen.append((side, result)),
    )
    (tuned_side, tuned), (base_side, base) = seen
    assert (tuned_side, base_side) == ("tuned", "base")
    assert [s["prompt_hash"] for s in tuned.samples] == [s["prompt_hash"] for s in base.samples]
    assert [s["log_likelihoods"] for s in tuned.samples] != [s["log_likelihoods"] for s in base.samples]
    with shifted(model):
        alone = evaluate(model, tokenizer, ["cola"], config=config, data_root=str(root / "cola"), seed=0)["cola"]
    assert [s["log_likelihoods"] for s in alone.samples] == [s["log_likelihoods"] for s in base.samples]
    score = outcome["scores"]["cola"]
    assert (score["tuned"], score["base"]) == (tuned.score, base.score)
    assert score["difference"] == pytest.approx(tuned.score - base.score)
    changes = [
        a["metrics"]["acc,none"] - b["metrics"]["acc,none"] for a, b in zip(tuned.samples, base.samples, strict=True)
    ]
    assert score["difference_stderr"] == pytest.approx(np.std(changes, ddof=1) / len(changes) ** 0.5)
    assert score["metric"] == "acc,none" and score["n"] == len(MANY) and score["num_fewshot"] == 1
    assert score["tuned_metrics"]["mcc,none"]["value"] == tuned.metrics["mcc,none"]
    assert list(outcome["skipped"]) == ["humaneval"]
    assert "eval.allow_code_execution=true" in outcome["skipped"]["humaneval"]


@pytest.mark.parametrize("with_mode", [True, False])
def test_compare_without_a_base(model, tokenizer, root, with_mode):
    config = EvalConfig(base=not with_mode)
    mode = (lambda: pytest.fail("the base was asked for")) if with_mode else None
    outcome = compare(model, tokenizer, ["tiny_facts"], config=config, data_root=str(root), seed=0, base_mode=mode)
    score = outcome["scores"]["tiny_facts"]
    assert score["base"] is score["difference"] is score["base_stderr"] is score["difference_stderr"] is None
    assert 0 <= score["tuned"] <= 1


def test_limit_and_progress(model, tokenizer, root):
    seen = []
    config = EvalConfig(limit=4, batch_size=3)
    result = evaluate(
        *(model, tokenizer, ["cola"]),
        config=config,
        data_root=str(root / "cola"),
        seed=0,
        progress=lambda *event: seen.append(event),
    )
    assert result["cola"].n == 4
    assert seen == [("cola", "tuned", done, 8) for done in range(1, 9)]


def test_truncated_prompts_are_counted_and_said(model, tokenizer, root, caplog):
    whole = run(model, tokenizer, ["cola"], root / "cola")["cola"]
    with caplog.at_level(logging.WARNING, logger="loramoe_train"):
        cut = run(model, tokenizer, ["cola"], root / "cola", max_length=20)["cola"]
    assert whole.truncated == 0 and "lost their start" in caplog.text
    lengths = [len(tokenizer.encode(s["prompt"] + c)) for s in whole.samples for c in s["continuations"]]
    assert cut.truncated == sum(length > 21 for length in lengths) > 0


def test_truncated_generation_prompts_are_counted(model, tokenizer, root):
    result = run(model, tokenizer, ["tiny_math"], root, max_length=20, max_new_tokens=8)["tiny_math"]
    assert result.truncated == 2


def test_answer_longer_than_the_model_is_refused(model, tokenizer, root):
    rows = [{"question": "q", "choices": {"text": ["x " * 50, "y"], "label": ["A", "B"]}, "answerKey": "A"}]
    write_local(root, "tiny_facts", rows)
    with pytest.raises(DataError, match="tiny_facts: an answer of .* tokens is longer than the 16 that fit"):
        run(model, tokenizer, ["tiny_facts"], root, max_length=16)


def test_humaneval_from_prompt_to_pass_at_1(model, tokenizer, root, tmp_path, monkeypatch):
    """The whole path, with the completions put in the model's mouth: the first is right, the second is not."""
    from loramoe_train.evaluation import harness, sandbox
    from loramoe_train.evaluation.outcomes import OutcomeFiles

    try:
        level = sandbox.detect().level
    except ConfigError as error:
        pytest.skip(str(error))
    write_local(root, "humaneval")
    monkeypatch.setattr(harness.InMemoryModel, "generate_until", lambda *_, **__: ["    return a + b\n"] * 2)
    results = []
    outcome = compare(
        model,
        tokenizer,
        ["humaneval"],
        config=EvalConfig(allow_code_execution=True, max_new_tokens=8),
        data_root=str(root),
        seed=0,
        base_mode=nullcontext,
        on_result=lambda side, found: results.append(found),
        on_program=OutcomeFiles(tmp_path / "samples"),
    )
    result = results[0]
    assert (result.score, result.metric, result.n, result.num_fewshot) == (0.5, "pass@1,create_test", 2, 0)
    assert outcome["scores"]["humaneval"]["sandbox"] == result.sandbox == level
    first, second = (sample["filtered"]["create_test"][0][0] for sample in result.samples)
    assert (first["verdict"], second["verdict"]) == ("passed", "failed")
    assert second["message"].startswith("AssertionError")
    assert first["code"] == LOCAL["humaneval"][0]["prompt"] + "    return a + b\n"
    for side in ("tuned", "base"):
        lines = (tmp_path / "samples" / f"humaneval.{side}.code.jsonl").read_text().splitlines()
        written = sorted(map(json.loads, lines), key=lambda entry: entry["index"])
        assert [entry["verdict"] for entry in written] == ["passed", "failed"]
        assert written[0]["code"] == first["code"]


def test_chat_template(model, tokenizer, plain_tokenizer, root):
    result = run(model, tokenizer, ["tiny_math"], root, chat_template=True)["tiny_math"]
    assert result.samples[0]["prompt"].startswith("<|user|>Question: ")
    assert result.samples[0]["prompt"].endswith("<|assistant|>")
    plain_tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="eval.chat_template=true, but the tokenizer has no chat template"):
        run(model, plain_tokenizer, ["tiny_math"], root, chat_template=True)


def test_generation_longer_than_the_model_is_refused_before_it_runs(model, tokenizer, root):
    """The tiny model holds 256 positions; gsm8k's own budget is 256 tokens."""
    with pytest.raises(ConfigError, match="gsm8k generates up to 256 tokens, but the model holds 256"):
        evaluate(model, tokenizer, ["gsm8k"], config=EvalConfig(num_fewshot=0), data_root=str(root), seed=0)


def test_malformed_row_in_the_middle_names_file_and_line(model, tokenizer, root):
    path = root / "tiny_grammar" / "test.jsonl"
    path.write_text(path.read_text() + '{"sentence": "x"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl:3: no column 'label'"):
        run(model, tokenizer, ["tiny_grammar"], root)


def test_unreachable_hub_names_the_command(model, tokenizer, monkeypatch):
    monkeypatch.setattr("loramoe_train.evaluation.check.is_offline", lambda: False)
    with pytest.raises(MissingFileError, match=r"load_dataset\('nyu-mll/glue', 'sst2'\)") as caught:
        evaluate(model, tokenizer, ["sst2"], config=EvalConfig(), data_root=None, seed=0)
    assert "\n" not in str(caught.value)


def test_out_of_memory_says_what_to_lower(model, tokenizer, root, monkeypatch):
    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("loramoe_train.evaluation.harness.run_lm_eval", full)
    with pytest.raises(OutOfMemoryError, match="tiny_grammar ran out of memory; lower eval.batch_size"):
        run(model, tokenizer, ["tiny_grammar"], root)


def test_batches_change_nothing_and_are_halved_where_the_memory_is_short(model, tokenizer, root):
    """Whatever the batch sizes, and on a device that holds no pass of more than 90 tokens."""
    names, root = ["cola", "tiny_facts", "tiny_math"], root / "cola"
    write_local(root, "tiny_facts"), write_local(root, "tiny_math")
    one, many = (
        run(model, tokenizer, names, root, batch_size=size, generation_batch_size=size, max_new_tokens=8)
        for size in (1, None)
    )
    refused = []

    def small(module, args, kwargs):
        if kwargs["input_ids"].numel() > 90:
            refused.append(kwargs["input_ids"].shape)
            raise torch.OutOfMemoryError("out of memory")

    hook = model.register_forward_pre_hook(small, with_kwargs=True)
    short = run(model, tokenizer, names, root, batch_size=None, generation_batch_size=None, max_new_tokens=8)
    hook.remove()
    assert refused
    for name, result in one.items():
        for other in (many[name], short[name]):
            assert other.metrics == result.metrics
            for mine, theirs in zip(result.samples, other.samples, strict=True):
                assert mine.get("responses") == theirs.get("responses")
                assert mine.get("log_likelihoods") == pytest.approx(theirs.get("log_likelihoods"), abs=1e-4)


TWO_RANKS = """
    import json, sys
    import torch
    from accelerate import Accelerator
    from loramoe_train.evaluation.harness import evaluate
    from loramoe_train.schema.evaluation import EvalConfig
    from tests.conftest import make_llama, make_tokenizer

    accelerator, tokenizer = Accelerator(cpu=True), make_tokenizer()
    model = accelerator.prepare(make_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id))
    config = EvalConfig(max_new_tokens=6, num_fewshot=1, max_length=30, limit=17)
    found = evaluate(model, tokenizer, ["cola", "tiny_math"], config=config, data_root=sys.argv[1], seed=0,
                     accelerator=accelerator)
    plain = {n: [r.score, r.stderr, r.n, r.truncated, r.samples] for n, r in found.items()}
    with open(f"{sys.argv[2]}.{accelerator.process_index}", "w") as file:
        json.dump([accelerator.num_processes, plain], file)
    accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tokenizer, root, tmp_path):
    """Odd numbers of documents, so that the shares differ; few-shot examples come from one random stream."""
    data, out = root / "cola", tmp_path / "out"
    write_local(data, "tiny_math", LOCAL["tiny_math"])
    (data / "tiny_math" / "test.jsonl").write_text((data / "tiny_math" / "train.jsonl").read_text())
    alone = make_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    config = EvalConfig(max_new_tokens=6, num_fewshot=1, max_length=30, limit=17)
    one = evaluate(alone, tokenizer, ["cola", "tiny_math"], config=config, data_root=str(data), seed=0)
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, str(script), str(data), str(out)], check=True, cwd=ROOT, timeout=300)
    (count, first), (_, second) = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert count == 2 and first == second
    for name, result in one.items():
        score, stderr, n, truncated, samples = first[name]
        assert [score, stderr] == pytest.approx([result.score, result.stderr])
        assert (n, truncated) == (result.n, result.truncated)
        for mine, theirs in zip(result.samples, samples, strict=True):
            assert mine["prompt"] == theirs["prompt"] and mine["metrics"] == theirs["metrics"]
            assert mine.get("responses") == theirs.get("responses")
    assert one["cola"].truncated > 0  # so that the counts of both ranks were added up
