"""Batched generation that lets go of finished rows, against the slow twin; and how much it computes."""

import pytest
import torch

from loramoe_train.evaluation.batches import BatchSize
from loramoe_train.evaluation.generation import generate
from loramoe_train.evaluation.likelihood import log_likelihoods
from loramoe_train.evaluation.shared_contexts import SharedContexts
from loramoe_train.models import load_tokenizer
from loramoe_train.run import build_routed
from tests.composing import composed
from tests.conftest import make_llama
from tests.evaluation import reference
from tests.test_routed_model import make_mamba

PROMPTS = ["Tom has 3 apples", "The quick brown fox jumps over", "Question: yes", "def add", "a", "Is this"]


@pytest.fixture(scope="module")
def lively(tokenizer):
    """A model that writes something else after each prompt."""
    model = make_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(10.0)
            layer.self_attn.o_proj.weight.mul_(10.0)
    return model


def encode(tokenizer, prompts):
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    encoded = tokenizer(prompts, padding=True, return_tensors="pt")
    tokenizer.padding_side = side
    return encoded["input_ids"], encoded["attention_mask"]


def written(model, tokenizer, stops, *, new_tokens=24, **options):
    ids, mask = encode(tokenizer, PROMPTS)
    settings = {"stops": stops, "new_tokens": new_tokens, "drops_rows": True, "do_sample": False, **options}
    with torch.no_grad():
        return generate(model, tokenizer, ids, mask, **settings)


def some_stops(model, tokenizer):
    """Strings that some rows write early, and others late or never."""
    slow = reference.in_float64(model)
    texts = [reference.generate(slow, tokenizer, prompt, stops=[], new_tokens=24) for prompt in PROMPTS]
    return texts, [text[position : position + 2] for text, position in zip(texts, (2, 5, 9), strict=False)]


@pytest.mark.parametrize("drops_rows", [True, False])
def test_equal_the_slow_twin_whatever_ends_when(lively, tokenizer, drops_rows):
    texts, stops = some_stops(lively, tokenizer)
    rows = written(lively, tokenizer, stops, drops_rows=drops_rows)
    slow = reference.in_float64(lively)
    lengths = set()
    for prompt, tokens in zip(PROMPTS, rows, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        assert text == reference.generate(slow, tokenizer, prompt, stops=stops, new_tokens=24)
        lengths.add(len(tokens))
    assert len(lengths) > 2 and max(lengths) <= 24


def test_finished_rows_cost_nothing_more(lively, tokenizer):
    _, stops = some_stops(lively, tokenizer)
    computed = {}
    for drops_rows in (True, False):
        sizes = []
        hook = lively.register_forward_pre_hook(
            lambda _, args, kwargs, sizes=sizes: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        rows = written(lively, tokenizer, stops, drops_rows=drops_rows)
        hook.remove()
        computed[drops_rows] = sum(sizes)
        # the last token of the longest row is only written: no pass beyond it
        assert len(sizes) == max(map(len, rows)) and sizes[0] == len(PROMPTS)
    assert computed[True] < computed[False] == len(PROMPTS) * max(map(len, rows))


def test_end_tokens_finish_a_row(lively, tokenizer):
    before = written(lively, tokenizer, [])
    end = before[1][3]
    lively.generation_config.eos_token_id = [end, tokenizer.eos_token_id]
    try:
        rows = written(lively, tokenizer, [])
    finally:
        lively.generation_config.eos_token_id = tokenizer.eos_token_id
    for row, whole in zip(rows, before, strict=True):
        cut = whole.index(end) + 1 if end in whole else len(whole)
        assert row == whole[:cut]
    assert len(rows[1]) <= 4


def test_recurrent_states_are_generated_as_one_batch(tokenizer):
    """State-space layers keep no entry per row that could be taken out; their rows only end by themselves."""
    model = make_mamba().eval()
    ids = torch.randint(5, 50, (4, 6))
    options = {"stops": [], "new_tokens": 5, "drops_rows": False, "do_sample": False}
    rows = generate(model, tokenizer, ids, torch.ones_like(ids), **options)
    for own, prompt in zip(rows, ids, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert own == alone[0, 6:].tolist()


@pytest.mark.parametrize("overrides", [["+recipe=mola", "router.scope=model"], ["+recipe=mixlora"], ["+recipe=mola"]])
def test_routed_models_lose_rows_and_share_contexts_without_a_change(overrides):
    """A decision of the whole model has a cache of its own beside the caller's; both lose the same rows."""
    config = composed(*overrides, "experts.rank=2", "experts.layout=3", "router.top_k=1")
    routed = build_routed(config, ["a"], device="cpu")
    tokens = load_tokenizer(config.model)
    torch.manual_seed(0)
    ups = [parameter for name, parameter in routed.model.named_parameters() if name.endswith(".up")]
    assert ups
    for up in ups:
        up.data.normal_(0, 0.3)
    model = routed.model.eval()
    ids, mask = encode(tokens, PROMPTS)
    rows = {}
    for drops_rows in (True, False):
        settings = {"stops": ["e"], "new_tokens": 12, "drops_rows": drops_rows, "do_sample": False}
        rows[drops_rows] = generate(model, tokens, ids, mask, **settings)
    assert rows[True] == rows[False] and len(set(map(len, rows[True]))) > 1
    requests = [
        (tokens.encode(text), tokens.encode(answer)) for text in PROMPTS[:2] for answer in (" yes it is", " no")
    ]
    sharing = SharedContexts(model)
    assert sharing.longest
    with torch.no_grad():
        plain = log_likelihoods(model, requests, max_length=64, size=BatchSize(rows=8))
        shared = log_likelihoods(model, requests, max_length=64, size=BatchSize(rows=8), sharing=sharing)
    assert sharing.longest and [a for a, _ in shared] == pytest.approx([a for a, _ in plain], abs=1e-3)
