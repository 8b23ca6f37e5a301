"""Gates on experts' outputs: against the twin, blind to answers, frozen while generating."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loramoe_train.build import build_aux, check_fit
from loramoe_train.data.collate import collate
from loramoe_train.data.tokens import Example
from loramoe_train.errors import ConfigError
from loramoe_train.evaluation.harness import compare
from loramoe_train.experts.peft_folder import read_peft_folder
from loramoe_train.experts.probed import ProbedBlock
from loramoe_train.schema.evaluation import EvalConfig
from loramoe_train.site_plan import plan_sites
from loramoe_train.training.step import model_inputs
from tests.composing import composed
from tests.conftest import make_llama
from tests.evaluation.rows import write_local
from tests.test_routed_model import ids_of, make_mamba, make_peft, route
from tests.twins import Case
from tests.twins.sequence import TWINS

COVERED = (("q_proj", "v_proj", "up_proj"), ("q_proj", "o_proj"), ("k_proj", "gate_proj", "down_proj"))
LENGTHS, PROMPTS = (7, 5, 6), (3, 1, 4)


def build(folder, kind="llama", *, vocab_size=50):
    """A tiny model with three imported adapters of two ranks under stirred gates, its untouched base, the config."""
    base = make_llama(vocab_size=vocab_size) if kind == "llama" else make_mamba()
    covered = COVERED if kind == "llama" else (("in_proj", "x_proj"), ("in_proj",), ("x_proj", "dt_proj"))
    folders = [
        make_peft(base, folder / str(n), n, r=2 + n % 2, target_modules=list(names)) for n, names in enumerate(covered)
    ]
    own = () if kind == "llama" else ("model=falcon_mamba_7b",)
    config = composed("+recipe=mole", f"experts.adapters=[{','.join(map(str, folders))}]", *own)
    routed = route(copy.deepcopy(base), config, [read_peft_folder(path) for path in folders])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in routed.blocks.values():
            block.router.score.weight.normal_(0, 3.0, generator=generator)
            block.router.log_temperature.fill_(-0.4)
    for parameter in routed.groups["experts"].values():
        parameter.requires_grad_(False)
    return routed, base, config


def examples(lengths=LENGTHS, prompts=PROMPTS, seed=0):
    ids = ids_of(len(lengths), max(lengths), seed=seed).numpy()
    return [
        Example(f"t:train:{n}", n, n, ids[n, :length].astype(np.int32), np.arange(length) >= prompt)
        for n, (length, prompt) in enumerate(zip(lengths, prompts, strict=True))
    ]


def open_pass(routed, batch, backward=None):
    """(logits of every example's own tokens, records, tokens); runs backward of the sum of `backward` of the logits."""
    tokens = batch.tokens()
    with routed.context.open(tokens) as records:
        logits_NV = routed.model(**model_inputs(batch, torch.float64), use_cache=False).logits.flatten(0, 1)
        logits = [logits_NV[tokens.sample_N == n] for n in range(tokens.num_samples)]
        if backward is not None:
            sum(backward(part) for part in logits).backward()
        return logits, dict(records), tokens


def test_values_and_gradients_equal_the_equations(tmp_path):
    """Gates over attention and feed-forward blocks, LoRAs that some blocks lack."""
    routed, base, config = build(tmp_path)
    routed.model.double().train()
    gates = routed.groups["routers"]
    assert len(gates) == 8 and all(isinstance(block, ProbedBlock) for block in routed.blocks.values())
    (term,) = build_aux(config, routed.plan).values()
    batch = collate(examples(), pad_id=0, multiple=4)
    ours, records, tokens = open_pass(routed, batch)
    assert sorted(records) == sorted(routed.recorded) == sorted(routed.blocks)
    balance = term.weight * term.loss(records, tokens, term.loss.statistics(records, tokens))
    leaves = {name: t.clone().requires_grad_() for name, t in routed.tensors().items()}
    adapters = [read_peft_folder(tmp_path / str(number)).modules for number in range(len(COVERED))]
    shape = {"domains": (0, 0, 0), "tasks": (0, 0, 0), "num_domains": 1, "rank": 0, "alpha": 0.0}
    given = {"prompts": PROMPTS, "adapters": adapters, "stage": 0, **shape}
    theirs_BSV, slow_balance = TWINS["mole"](Case(base.double(), leaves, batch.input_ids, batch.valid, **given))
    slow = [theirs_BSV[row, :length] for row, length in enumerate(LENGTHS)]
    for one, two in zip((*ours, balance), (*slow, slow_balance), strict=True):
        torch.testing.assert_close(one, two)
    loss, slow_loss = (sum(logits.square().mean() for logits in each) for each in (ours, slow))
    gradients = torch.autograd.grad(loss + balance, list(gates.values()))
    expected = torch.autograd.grad(slow_loss + slow_balance, [leaves[name] for name in gates])
    for name, one, two in zip(gates, gradients, expected, strict=True):
        assert two.abs().max() > 0, name
        torch.testing.assert_close(one, two, msg=lambda text, n=name: f"{n}: {text}")


def test_no_answer_token_reaches_a_gate(tmp_path):
    routed, _, _ = build(tmp_path)
    routed.model.double().eval()
    with torch.no_grad():
        before, records, tokens = open_pass(routed, collate(examples(), pad_id=0))
        changed = [copy.deepcopy(example) for example in examples()]
        changed[0].ids[PROMPTS[0] :] += 1
        changed[2].ids[PROMPTS[2] - 1] += 1
        after, others, _ = open_pass(routed, collate(changed, pad_id=0))
    torch.testing.assert_close(before[0][: PROMPTS[0]], after[0][: PROMPTS[0]])
    assert not torch.allclose(before[0][PROMPTS[0] :], after[0][PROMPTS[0] :])
    for name, routing in records.items():
        same = torch.isclose(routing.weights_NE, others[name].weights_NE).all(dim=1)
        assert same[tokens.sample_N < 2].all() and not same[tokens.sample_N == 2].any(), name


def generate(routed, ids, mask=None, **how):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
    with torch.no_grad(), routed.context.serving(prompt=ids.shape[1]):
        made = routed.model.eval().generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
        )
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])
@pytest.mark.parametrize("beams", [1, 2])
def test_gates_are_decided_on_the_prompt_and_stay(tmp_path, kind, beams):
    """With a cache as without one that is told where the prompt ends; beams of a prompt share its decision."""
    routed, _, _ = build(tmp_path, kind)
    routed.model.double()
    ids = ids_of(rows=2, length=4)
    cached, logits = generate(routed, ids, use_cache=True, num_beams=beams)
    plain, expected = generate(routed, ids, use_cache=False, num_beams=beams)
    assert torch.equal(cached, plain)
    torch.testing.assert_close(logits, expected)
    alone, own = generate(routed, ids[1:], use_cache=True, num_beams=beams)
    assert torch.equal(alone[0], cached[1])
    torch.testing.assert_close(own, logits[:, beams:])


def test_padding_on_the_left_changes_nothing(tmp_path):
    routed, _, _ = build(tmp_path)
    routed.model.double()
    ids = ids_of(rows=2, length=5)
    ids[0, :2], mask = 0, torch.ones_like(ids)
    mask[0, :2] = 0
    together, logits = generate(routed, ids, mask)
    alone, own = generate(routed, ids[:1, 2:])
    assert torch.equal(alone[0], together[0, 2:])
    torch.testing.assert_close(own[:, 0], logits[:, 0])


def test_a_new_sequence_never_meets_an_old_gate(tmp_path):
    routed, _, _ = build(tmp_path)
    model, (one, two) = routed.model.double().eval(), ids_of(rows=2, length=4)[:, None]

    def start(ids):
        out = model(ids, use_cache=True)
        return SimpleNamespace(cache=out.past_key_values, logits=[out.logits[:, -1]])

    def go_on(state, token):
        out = model(torch.tensor([[token]]), use_cache=True, past_key_values=state.cache)
        state.logits.append(out.logits[:, -1])

    with torch.no_grad():
        first = start(one)
        go_on(first, 7)
        second = start(two)  # while the first goes on
        for token in (8, 9):
            go_on(second, token), go_on(first, token)
        whole = []
        for ids, tokens in ((one, [7, 8, 9]), (two, [8, 9])):
            with routed.context.serving(prompt=4):
                whole.append(model(torch.cat([ids, torch.tensor([tokens])], dim=1), use_cache=False).logits[:, 3:])
        torch.testing.assert_close(torch.stack(first.logits, dim=1), whole[0])
        torch.testing.assert_close(torch.stack(second.logits, dim=1), whole[1])
        with routed.context.override("off"):
            unseen = start(one)
        with pytest.raises(RuntimeError, match="has decided nothing for the sequences of this cache"):
            go_on(unseen, 7)
        with pytest.raises(RuntimeError, match="filled by other calls"):
            model(one[:, :1], use_cache=True, past_key_values=copy.deepcopy(first.cache))
        with pytest.raises(RuntimeError, match="does not tell whether it is empty"):
            model(one, past_key_values=object())


def test_given_answers_are_scored_by_gates_that_never_saw_them(tmp_path, tokenizer):
    """Through lm-eval in batches, as one example after the other in a batch of its own."""
    routed, _, _ = build(tmp_path, vocab_size=len(tokenizer))
    routed.model.config.eos_token_id = tokenizer.eos_token_id
    write_local(tmp_path, "tiny_facts")
    found = []
    settings = {
        "config": EvalConfig(batch_size=3, base=False),
        "data_root": str(tmp_path),
        "seed": 0,
        "base_mode": None,
    }
    note = {"on_result": lambda side, result: found.extend(result.samples)}
    compare(routed.model, tokenizer, ["tiny_facts"], reading=routed.context.open, **settings, **note)
    routed.model.double().eval()
    for sample in found:
        prompt = tokenizer.encode(sample["prompt"])
        for answer, scored in zip(sample["continuations"], sample["log_likelihoods"], strict=True):
            ids = np.asarray(tokenizer.encode(sample["prompt"] + answer), dtype=np.int32)
            assert ids[: len(prompt)].tolist() == prompt
            example = Example("t", 0, 0, ids, np.arange(len(ids)) >= len(prompt))
            with torch.no_grad():
                (logits,), _, _ = open_pass(routed, collate([example], pad_id=0))
            wanted = torch.from_numpy(ids[len(prompt) :]).long()
            own = logits[len(prompt) - 1 : -1].log_softmax(dim=-1).gather(1, wanted[:, None]).sum()
            assert scored == pytest.approx(own.item(), abs=1e-3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("router.scope=site", "router.scope=site"),
        ("experts.mixing=output", "experts.mixing=output"),
        ("experts=magnitude", "experts.make=MagnitudeBank"),
    ],
)
def test_an_output_gate_stands_over_blocks_of_added_experts(override, said):
    """Fresh experts may be under such a gate, too; refused is what has no output that is added."""
    own = ("router=output_gate", "experts.layout=2", "experts.sites=[ffn]", "experts.rank=2")
    base = make_llama(vocab_size=50)
    config = composed(*own)
    check_fit(config, plan_sites(config, base, ["a"]))
    config = composed(override, *own) if override.startswith("experts=") else composed(*own, override)
    with pytest.raises(ConfigError, match=f"{said}.*needs router.scope=block, experts.mixing=delta"):
        check_fit(config, plan_sites(config, base, ["a"]))
