"""One optimizer step against its slow obvious twin: one batch, all logits, Python loops, float64."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramoe_train.data.batch import IGNORE, MixedBatch
from loramoe_train.errors import DataError, DivergedError
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.parts import AuxTerm, TrainingParts
from tests.training.harness import TASKS, double_parts, make_batch, make_parts, make_step, make_trainer, weights

SAMPLES = list(range(8))


def twin_losses(parts: TrainingParts, batch: MixedBatch) -> dict[int, list[Tensor]]:
    """task -> loss of each supervised token; the context is open."""
    logits = parts.model(input_ids=batch.input_ids, attention_mask=batch.valid.long(), use_cache=False).logits.double()
    found: dict[int, list[Tensor]] = {task: [] for task in range(len(TASKS))}
    for b, row in enumerate(batch.labels.tolist()):
        for s, label in enumerate(row):
            if s > 0 and label != IGNORE:
                found[int(batch.task_ids[b, s])].append(-logits[b, s - 1].log_softmax(-1)[label])
    return found


def twin(parts: TrainingParts, pieces: Sequence[Sequence[int]], aux: Sequence[str]) -> dict:
    """Values of the step's terms and gradients of their weighted sum; `pieces` are the micro-batches over all ranks."""
    whole = make_batch([sample for piece in pieces for sample in piece])
    with parts.context.open(whole.tokens()) as records:
        by_task = twin_losses(parts, whole)
        tokens = [loss for losses in by_task.values() for loss in losses]
        total = sum(tokens) / len(tokens)
        raw = {}
        for name in aux:
            term = parts.aux[name]
            if term.scope == "step":
                raw[name] = term.loss(records, whole.tokens(), term.loss.statistics(records, whole.tokens()))
        for name in aux:
            term = parts.aux[name]
            if term.scope == "micro_batch":
                raw[name] = sum(piece_loss(parts, term, piece) for piece in pieces) / len(pieces)
        total = total + sum(parts.aux[name].weight * value for name, value in raw.items())
    named = {n: p for members in parts.groups.values() for n, p in members.items() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(named.values()))
    return {
        "losses": {task: [x.item() for x in losses] for task, losses in by_task.items()},
        "aux": {name: value.item() for name, value in raw.items()},
        "gradients": dict(zip(named, gradients, strict=True)),
    }


def piece_loss(parts: TrainingParts, term: AuxTerm, piece: Sequence[int]) -> Tensor:
    """A term on one micro-batch alone. The records of the surrounding batch are put back afterwards."""
    batch, outer = make_batch(piece), parts.context.records
    tokens, parts.context._tokens = parts.context._tokens, None
    with parts.context.open(batch.tokens()) as records:
        parts.model(input_ids=batch.input_ids, attention_mask=batch.valid.long(), use_cache=False)
        value = term.loss(records, batch.tokens(), term.loss.statistics(records, batch.tokens()))
    parts.context._tokens, parts.context.records = tokens, outer
    return value


@pytest.mark.parametrize(("micro", "checkpointing"), [(8, False), (4, False), (2, False), (2, True), (1, False)])
def test_any_split_equals_one_batch(micro: int, checkpointing: bool, tmp_path: Path) -> None:
    parts = double_parts()
    gradients: dict[str, Tensor] = {}

    def keep(step: int) -> None:
        for members in parts.groups.values():
            gradients.update({name: p.grad.clone() for name, p in members.items()})

    trainer = make_trainer(stages={"only": {}}, clip_norm=None)
    step = make_step(parts, trainer, "only", tmp_path, before_update=keep)
    pieces = [SAMPLES[i : i + micro] for i in range(0, len(SAMPLES), micro)]
    expected = twin(parts, pieces, ["balance", "special"])
    if checkpointing:
        parts.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        parts.model.enable_input_require_grads()
    result = step(0, [make_batch(piece) for piece in pieces]).read()
    for task, losses in expected["losses"].items():
        assert result.task_tokens[task] == len(losses)
        assert result.task_sums[task] == pytest.approx(sum(losses), rel=1e-12)
    for name, value in expected["aux"].items():
        assert result.aux[name] == pytest.approx(value, rel=1e-10)
    assert set(gradients) == set(expected["gradients"])
    for name, gradient in expected["gradients"].items():
        # Llama's norms compute in float32 even here; a wrong share of a rank or micro-batch would be off by a factor
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")
    assert result.loss == pytest.approx(sum(result.task_sums) / sum(result.task_tokens))
    assert result.tokens == sum(int(make_batch(piece).valid.sum()) for piece in pieces)


def test_the_balance_of_micro_batches_is_not_that_of_the_step(tmp_path: Path) -> None:
    """If both scopes gave the same number, the test above could not tell them apart."""
    values = {}
    for scope in ("step", "micro_batch"):
        parts = double_parts()
        parts = replace(parts, aux={"balance": replace(parts.aux["balance"], scope=scope)})
        step = make_step(parts, make_trainer(stages={"only": {}}), "only", tmp_path)
        values[scope] = step(0, [make_batch([i]) for i in SAMPLES]).read().aux["balance"]
    assert abs(values["step"] - values["micro_batch"]) > 1e-3


def test_the_first_pass_draws_the_same_dropout(tmp_path: Path) -> None:
    """Statistics of the pass without gradient are those of the pass with it, bit for bit."""
    first, second = [], []

    class Spy:
        def statistics(self, records, tokens) -> Tensor:
            first.append({site: routing.weights_NE.clone() for site, routing in records.items()})
            return torch.zeros(1)

        def __call__(self, records, tokens, statistics) -> Tensor:
            second.append({site: routing.weights_NE.detach().clone() for site, routing in records.items()})
            return sum(routing.weights_NE.square().sum() for routing in records.values())

    parts = make_parts(dropout=0.5, aux={"spy": AuxTerm("spy", 0.1, "step", Spy())})
    step = make_step(parts, make_trainer(stages={"only": {}}), "only", tmp_path)
    step(0, [make_batch(SAMPLES[:4]), make_batch(SAMPLES[4:])])
    step(1, [make_batch(SAMPLES[:4]), make_batch(SAMPLES[4:])])
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[site], b[site]) for site in a)
    late = "model.layers.1.self_attn.q_proj"  # behind dropout, so the masks of different steps show
    assert not torch.equal(first[0][late], first[2][late])


def test_preservation_term(tmp_path: Path) -> None:
    """Value and gradient of anchor * sum ||theta - theta_0||^2, once per step however many micro-batches."""
    anchor, found = 0.7, {}
    for pieces in ([SAMPLES], [SAMPLES[:4], SAMPLES[4:]]):
        gradients = {}
        for weight in (0.0, anchor):
            parts = double_parts(aux={})
            step = make_step(parts, make_trainer(stages={"s": {"anchor": weight}}, clip_norm=None), "s", tmp_path)
            with torch.no_grad():
                for index, parameter in enumerate(parts.groups["experts"].values()):
                    parameter.add_(0.01 * (index + 1))
            gradients[weight] = {}
            step.before_update = lambda _, p=parts, into=gradients[weight]: into.update(
                {n: q.grad.clone() for n, q in p.groups["experts"].items()}
            )
            result = step(0, [make_batch(piece) for piece in pieces]).read()
        experts = list(parts.groups["experts"].items())
        expected = sum(p.numel() * (0.01 * (i + 1)) ** 2 for i, (_, p) in enumerate(experts))
        assert result.anchor == pytest.approx(expected, rel=1e-9)
        for index, (name, _) in enumerate(experts):
            pulled = gradients[anchor][name] - gradients[0.0][name]
            expected_pull = torch.full_like(pulled, 2 * anchor * 0.01 * (index + 1))
            torch.testing.assert_close(pulled, expected_pull, rtol=1e-9, atol=1e-12)
        found[len(pieces)] = result.anchor
    assert found[1] == found[2]


def test_clipping(tmp_path: Path) -> None:
    """Groups are clipped together, by the norm of all; the logged norms are those before."""
    norms = {}
    for clip in (None, 1e-3):
        parts = double_parts(aux={})
        step = make_step(parts, make_trainer(stages={"s": {}}, clip_norm=clip), "s", tmp_path)
        seen = []
        step.optimizer.step = lambda seen=seen, parts=parts: seen.append(
            sum(float(p.grad.square().sum()) for m in parts.groups.values() for p in m.values()) ** 0.5
        )
        result = step(0, [make_batch(SAMPLES)]).read()
        norms[clip] = (seen[0], result.grad_norms)
    whole = (norms[None][1]["experts"] ** 2 + norms[None][1]["routers"] ** 2) ** 0.5
    assert norms[None][0] == pytest.approx(whole, rel=1e-6)
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e-3][1] == pytest.approx(norms[None][1])


def test_a_row_of_padding_changes_nothing(tmp_path: Path) -> None:
    """Ranks are evened out with rows that hold no token at all."""

    def train(batches: list[MixedBatch]) -> tuple[TrainingParts, dict]:
        parts = double_parts()
        step = make_step(parts, make_trainer(stages={"only": {}}), "only", tmp_path)
        result = step(0, batches).read()
        return parts, {"sums": result.task_sums, "aux": result.aux}

    def blank(batch: MixedBatch) -> MixedBatch:
        """The batch with a last row of padding."""
        extra = make_batch([0])
        fill = {"input_ids": 0, "labels": IGNORE, "valid": False, "position_ids": 0}
        fields = {
            name: torch.cat([tensor, torch.full_like(getattr(extra, name), fill.get(name, -1))])
            for name, tensor in vars(batch).items()
            if isinstance(tensor, Tensor)
        }
        return replace(batch, **fields)

    plain, plain_result = train([make_batch(SAMPLES)])
    padded, padded_result = train([blank(make_batch(SAMPLES))])
    assert padded_result["sums"] == pytest.approx(plain_result["sums"], rel=1e-12)
    assert padded_result["aux"] == pytest.approx(plain_result["aux"], rel=1e-9)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(padded)[name], value, rtol=1e-9, atol=1e-12)


def test_packed_rows_equal_separate_ones(tmp_path: Path) -> None:
    def packed() -> MixedBatch:
        rows = [make_batch([i]) for i in SAMPLES[:2]]
        parts = [{n: t[0][r.valid[0]] for n, t in vars(r).items() if isinstance(t, Tensor)} for r in rows]
        parts[1]["segment_ids"] = parts[1]["segment_ids"] + 1
        return MixedBatch(
            **{name: torch.cat([p[name] for p in parts])[None] for name in parts[0]},
            example_ids=("a", "b"),
            packed=True,
        )

    results = []
    for batch in (make_batch(SAMPLES[:2]), packed()):
        parts = double_parts()
        step = make_step(parts, make_trainer(stages={"only": {}}), "only", tmp_path)
        results.append((step(0, [batch]).read(), weights(parts)))
    (a, weights_a), (b, weights_b) = results
    assert a.task_sums == pytest.approx(b.task_sums, rel=1e-9) and a.aux == pytest.approx(b.aux, rel=1e-9)
    assert a.tokens == b.tokens and a.task_tokens == b.task_tokens
    for name in weights_a:
        torch.testing.assert_close(weights_a[name], weights_b[name], rtol=1e-8, atol=1e-10)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    losses = {}
    for precision in ("no", "bf16"):
        parts = make_parts()
        step = make_step(parts, make_trainer(stages={"s": {}}, mixed_precision=precision), "s", tmp_path)
        losses[precision] = [step(i, [make_batch(SAMPLES)]).read().loss for i in range(3)]
    # bfloat16 keeps 8 bits: 2^-8 = 0.4 % of logits of about 1 nat
    assert losses["bf16"] != losses["no"] and losses["bf16"] == pytest.approx(losses["no"], abs=2e-2)


def test_divergence_names_the_batch_and_leaves_the_weights(tmp_path: Path) -> None:
    parts = make_parts()
    step = make_step(parts, make_trainer(stages={"only": {}}), "only", tmp_path)
    before = weights(parts)
    with torch.no_grad():
        parts.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError) as caught:
        step(0, [make_batch(SAMPLES[:6]), make_batch([6, 7, 8, 9])]).read()
    text = str(caught.value)
    assert "\n" not in text and "stage only, step 1" in text and "loss of task adding is nan" in text
    assert "adding:train:0, naming:train:1" in text and "and 2 more (all in diverged.json)" in text
    dumped = json.loads((tmp_path / "diverged.json").read_text())
    assert dumped["examples"] == [f"{TASKS[i % 3]}:train:{i}" for i in range(10)] and dumped["step"] == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(parts).items())
    assert not any(moved.any() for state in step.optimizer.state.values() for moved in state.values())


def test_infinite_gradient_alone(tmp_path: Path) -> None:
    class Steep:
        """A finite value with an infinite gradient: the square root at zero."""

        def statistics(self, records, tokens) -> Tensor:
            return torch.zeros(1)

        def __call__(self, records, tokens, statistics) -> Tensor:
            return sum((r.logits_NE.sum() * 0.0).sqrt() for r in records.values())

    parts = make_parts(aux={"steep": AuxTerm("steep", 1.0, "step", Steep())})
    step = make_step(parts, make_trainer(stages={"only": {}}), "only", tmp_path)
    with pytest.raises(
        DivergedError, match=r"step 1: gradient norm of the experts is nan, gradient norm of the routers"
    ):
        step(0, [make_batch(SAMPLES)]).read()


def everything(parts: TrainingParts, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all weights, moments and step counts."""
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return [*weights(parts).values(), *moments]


@pytest.mark.parametrize("fault", ["loss", "gradient", "nothing supervised"])
def test_a_step_that_must_not_count_moves_nothing_nor_do_those_after_it(fault: str, tmp_path: Path) -> None:
    """Two further steps are queued before anybody reads its numbers; the host has waited for none of them."""

    class Steep:
        """An infinite gradient where the scale is zero."""

        def statistics(self, records, tokens) -> Tensor:
            return torch.zeros(1)

        def __call__(self, records, tokens, statistics) -> Tensor:
            return sum((r.logits_NE.sum() * scale[0]).square().sqrt() for r in records.values())

    scale = [1e-6]
    parts = make_parts(aux={"steep": AuxTerm("steep", 1.0, "step", Steep())})
    step = make_step(parts, make_trainer(stages={"only": {}}, weight_decay=0.1), "only", tmp_path)
    batch, weight = make_batch(SAMPLES), parts.model.model.layers[0].mlp.down_proj.weight
    first = step(0, [batch])
    before = everything(parts, step.optimizer)
    if fault == "loss":
        kept, weight.data[0, 0] = weight.data[0, 0].clone(), float("inf")
    elif fault == "gradient":
        scale[0] = 0.0
    bare = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    bad = step(1, [bare if fault == "nothing supervised" else batch])
    if fault == "loss":
        weight.data[0, 0] = kept
    scale[0] = 1e-6
    later = [step(index, [batch]) for index in (2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(everything(parts, step.optimizer), before, strict=True))
    first.read()
    expected = {"loss": "step 2: loss of task", "gradient": "step 2: gradient norm", "nothing supervised": "no token"}
    with pytest.raises(DataError if fault == "nothing supervised" else DivergedError, match=expected[fault]):
        bad.read()
    assert later[0].read().loss > 0  # finite by itself


def test_an_optimizer_that_cannot_halt_is_asked_only_after_a_look(tmp_path: Path) -> None:
    parts = make_parts()
    step = make_step(parts, make_trainer(stages={"only": {}}), "only", tmp_path)
    step._halts_itself = False
    step.optimizer.found_inf = None
    before = weights(parts)
    parts.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="step 1: loss of task adding is nan"):
        step(0, [make_batch(SAMPLES)])
    assert all(torch.equal(value, before[name]) for name, value in weights(parts).items())


def test_no_supervised_token(tmp_path: Path) -> None:
    batch = make_batch(SAMPLES)
    step = make_step(make_parts(), make_trainer(stages={"s": {}}), "s", tmp_path)
    with pytest.raises(DataError, match="no token of the step carries loss; examples: adding:train:0"):
        step(0, [replace(batch, labels=torch.full_like(batch.labels, IGNORE))]).read()


WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique")


def test_a_step_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation whose result, or the size of whose result, the host must know, but for those on the host's batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from loramoe_train.training import step as step_module

    waited = []

    class Watching(TorchDispatchMode):
        on_host = False

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            by_mask = name.startswith("index") and any(
                isinstance(index, Tensor) and index.dtype == torch.bool
                for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
            )
            if not self.on_host and (name in WAITING or by_mask):
                waited.append(name)
            return function(*args, **(kwargs or {}))

    watching = Watching()

    def on_host(batch):
        watching.on_host = True
        try:
            return made(batch)
        finally:
            watching.on_host = False

    made = step_module.targets
    monkeypatch.setattr(step_module, "targets", on_host)
    # transformers asks whether a 2-D mask hides anything; that is its own, and once per forward pass
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *a, **k: False)
    trainer = make_trainer(stages={"second": {"anchor": 0.1}})
    parts = make_parts(dropout=0.1)
    step = make_step(parts, trainer, "second", tmp_path, anchors=dict(parts.groups["experts"]))
    batches = [make_batch(SAMPLES[:4]), make_batch(SAMPLES[4:])]
    step(0, batches)
    with watching:
        unread = step(1, batches)
    assert waited == []
    with watching:
        unread.read()
        parts.validation["adding"][0].valid.any().item()
    assert "_local_scalar_dense" in waited  # or it could not fail


def test_only_the_stage_s_groups_move(tmp_path: Path) -> None:
    trainer: TrainerConfig = make_trainer(stages={"r": {"train": ["routers"]}})
    parts = make_parts()
    before = weights(parts)
    make_step(parts, trainer, "r", tmp_path)(0, [make_batch(SAMPLES)])
    moved = {name for name, value in weights(parts).items() if not torch.equal(value, before[name])}
    assert moved == set(parts.groups["routers"])
