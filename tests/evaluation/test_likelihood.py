"""Likelihoods with all shortcuts against one request at a time in float64, and what each shortcut is taken for."""

from contextlib import contextmanager

import pytest
import torch

from loramoe_train.evaluation import likelihood
from loramoe_train.evaluation.batches import BatchSize
from loramoe_train.evaluation.likelihood import log_likelihoods
from loramoe_train.evaluation.shared_contexts import SharedContexts, longest_shared
from tests.conftest import make_llama
from tests.evaluation.reference import in_float64
from tests.test_routed_model import make_mamba

CONTEXTS = ([7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21, 22, 23, 24, 25, 26, 27, 28], [30], [0, 0, 31, 0])
ANSWERS = ([40, 41, 42], [40, 41], [43], [0, 0], [44], [40, 41, 42, 45, 46], [40])
REQUESTS = [(context, answer) for context in CONTEXTS for answer in ANSWERS] + [([7, 8, 9, 10, 11], [12, 13])]


def make_windowed():
    """Layers with a sliding window of 8 tokens, less than some rows have, between full ones."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    config = Gemma2Config(vocab_size=50, num_key_value_heads=1, sliding_window=16, **shape)
    return Gemma2ForCausalLM(config).eval()


def make_learned_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "llama": lambda: make_llama(vocab_size=50),
    "gemma2": make_windowed,
    "gpt2": make_learned_positions,
    "mamba": lambda: make_mamba().eval(),
}


def slow(model, requests, max_length):
    """(log-likelihood, greedy) of each request by itself, float64, no cache, no padding."""
    twin, found = in_float64(model), []
    for context, answer in requests:
        ids = (context + answer)[-(max_length + 1) :]
        with torch.no_grad():
            log_probs = twin(torch.tensor([ids[:-1]]), use_cache=False).logits[0, -len(answer) :].log_softmax(dim=-1)
        picked = log_probs.gather(1, torch.tensor(answer)[:, None])
        found.append((float(picked.sum()), log_probs.argmax(dim=-1).tolist() == answer))
    return found


def spread(model, max_length=64):
    """A random model is so even that a mistake could hide; and one answer shall be the greedy one."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
        ids = torch.tensor([CONTEXTS[0][-max_length:]])
        best = int(model(ids).logits[0, -1].argmax())
        return [*REQUESTS, (CONTEXTS[0], [best])]


@pytest.mark.parametrize("max_length", [64, 10])
@pytest.mark.parametrize("size", [{"rows": 3}, {"tokens": 64}])
@pytest.mark.parametrize("name", MODELS)
def test_equal_the_slow_twin(name, size, max_length):
    model = MODELS[name]()
    requests = spread(model, max_length)
    sharing = SharedContexts(model)
    told = []
    with torch.no_grad():
        found = log_likelihoods(
            model, requests, max_length=max_length, size=BatchSize(**size), sharing=sharing, done=lambda: told.append(1)
        )
    expected = slow(model, requests, max_length)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1] and len(told) == len(requests)
    assert (sharing.longest > 0) == (name != "mamba")  # and the check on a context computed both ways has held


def count_tokens(model, read, logits):
    """Note the tokens that a model reads, and the positions whose logits it computes."""

    def note(module, args, kwargs, output):
        read.append(kwargs["input_ids"].numel())
        logits.append(output.logits.shape[:-1].numel())

    return model.register_forward_hook(note, with_kwargs=True)


@torch.no_grad()
def test_nothing_is_computed_that_nobody_asked_for():
    model, context = make_llama(vocab_size=50), list(range(5, 25))
    requests = [(context, [30, 31]), (context, [32, 33, 34]), (context, [35]), (context, [36])]
    sharing = SharedContexts(model)
    sharing._checked = True  # leave out the one context that is computed both ways
    counts = {}
    for name, given in (("plain", None), ("shared", sharing)):
        read, logits = [], []
        hook = count_tokens(model, read, logits)
        log_likelihoods(model, requests, max_length=64, size=BatchSize(tokens=1000), sharing=given)
        hook.remove()
        counts[name] = (sum(read), sum(logits))
    # three rows of at most 22 tokens, as the one-token answers share theirs; or the context and two answers' beginnings
    assert counts == {"plain": (3 * 22, 2 + 3 + 1), "shared": (20 + 2 * 2, 1 + 1 + 2)}


def test_contexts_too_short_to_be_worth_it_are_not_shared():
    sharing = SharedContexts(make_llama(vocab_size=50))
    rows = likelihood._rows([([5], [6, 7]), ([5], [8, 9])], 64)
    assert sharing.families(rows) == ([], rows)


def test_a_model_that_gets_shared_contexts_wrong_goes_without(monkeypatch):
    """One that counts positions in its own way, say: found out on the first context, before any answer is used."""
    model = make_llama(vocab_size=50)
    forward = type(model).forward

    def deaf(self, **inputs):
        if inputs.get("past_key_values") is not None:
            inputs["position_ids"] = inputs["position_ids"] + 40
        return forward(self, **inputs)

    deaf.__module__ = forward.__module__
    requests = spread(model)
    monkeypatch.setattr("loramoe_train.evaluation.passes.accepts", lambda *_: True)
    monkeypatch.setattr("loramoe_train.evaluation.shared_contexts.accepts", lambda *_: True)
    monkeypatch.setattr(type(model), "forward", deaf)
    sharing = SharedContexts(model)
    assert sharing.longest > 0
    with torch.no_grad():
        found = log_likelihoods(model, requests, max_length=64, size=BatchSize(tokens=64), sharing=sharing)
    assert sharing.longest == 0
    monkeypatch.undo()
    assert [value for value, _ in found] == pytest.approx([v for v, _ in slow(model, requests, 64)], abs=2e-3)


def test_only_plain_caches_share_contexts():
    assert longest_shared(make_llama(vocab_size=50)) > 10**6
    assert longest_shared(make_windowed()) == 15  # a longer row would lose its start in the cache
    assert longest_shared(make_mamba()) == 0
    assert longest_shared(torch.nn.Linear(2, 2)) == 0


@torch.no_grad()
def test_models_that_must_be_told_are_told_every_row():
    told, model = [], make_llama(vocab_size=50)

    @contextmanager
    def reading(ids):
        told.extend(tuple(row) for row in ids.tolist())
        yield

    plain = log_likelihoods(model, REQUESTS, max_length=64, size=BatchSize(rows=4))
    found = log_likelihoods(model, REQUESTS, max_length=64, size=BatchSize(rows=4), reading=reading)
    assert found == plain
    rows = [tuple(context + answer[:-1]) for context, answer in REQUESTS]
    assert all(any(given[: len(row)] == row and not any(given[len(row) :]) for given in told) for row in rows)


def test_sums_are_taken_in_the_dtype_of_the_logits():
    """As lm-eval takes them: in bfloat16 a log-likelihood has eight bits, and choices tie as they do there."""
    model = make_llama(vocab_size=50).to(torch.bfloat16)
    ((value, _),) = log_likelihoods(model, [([5, 6], [7, 8, 9])], max_length=64, size=BatchSize(rows=1))
    with torch.no_grad():
        log_probs = model(torch.tensor([[5, 6, 7, 8]])).logits[0, -3:].log_softmax(dim=-1)
    assert value == float(log_probs.gather(1, torch.tensor([[7], [8], [9]])).sum())
