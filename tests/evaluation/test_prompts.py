"""Where prompts end, told to the model with every batch of likelihood requests, whatever lm-eval makes of them."""

from contextlib import contextmanager

import torch

from loramoe_train.evaluation.harness import compare
from loramoe_train.evaluation.prompts import KnownPrompts
from loramoe_train.schema.evaluation import EvalConfig
from tests.evaluation.rows import write_local


def test_every_row_is_told_its_prompt(model, tokenizer, tmp_path):
    """Answers of several tokens and of one, in rows of unequal length."""
    write_local(tmp_path, "tiny_facts"), write_local(tmp_path, "tiny_grammar")
    told, rows = [], []

    @contextmanager
    def reading(tokens):
        told.append(tokens)
        yield
        told.append(None)

    def note(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        tokens = told[-1]
        for row, own in zip(ids, (tokens.valid_N & ~tokens.supervised_N).view_as(ids), strict=True):
            rows.append(tokenizer.decode(row[own]))
        for name, field in (("valid", tokens.valid_N), ("sample", tokens.sample_N >= 0)):
            assert torch.equal(field.view_as(ids).sum(1) > 0, torch.ones(len(ids), dtype=torch.bool)), name
        assert tokens.num_samples == len(ids) and (tokens.task_N == -1).all()

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    settings = {
        "config": EvalConfig(batch_size=3, base=False),
        "data_root": str(tmp_path),
        "seed": 0,
        "base_mode": None,
    }
    found = []
    try:
        compare(
            model,
            tokenizer,
            ["tiny_facts", "tiny_grammar"],
            reading=reading,
            on_result=lambda _, r: found.append(r),
            **settings,
        )
    finally:
        hook.remove()
    prompts = {sample["prompt"] for result in found for sample in result.samples}
    assert set(rows) == prompts and len(rows) >= len(prompts) and told[-1] is None
    assert any(tokens.supervised_N.any() for tokens in told if tokens is not None)


def test_rows_are_cut_padded_and_recognised():
    requests = [(None, [5, 6, 7], [8, 9]), (None, [5, 6, 0], [0]), (None, [5], [6, 0, 4]), (None, [1, 2, 3, 4, 5], [6])]
    known = KnownPrompts(requests, max_length=4)
    tokens = known.tokens(torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [2, 3, 4, 5]]))
    # the second row is the prompt of one request and half answer in another: it shows the shorter prompt
    assert tokens.valid_N.view(3, 4).tolist() == [[True] * 4, [True, True, True, False], [True] * 4]
    prompt_BS = (tokens.valid_N & ~tokens.supervised_N).view(3, 4)
    assert prompt_BS.sum(dim=1).tolist() == [3, 1, 4]
    assert tokens.sample_N.view(3, 4).tolist() == [[0] * 4, [1, 1, 1, -1], [2] * 4]
