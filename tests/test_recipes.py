"""Every shipped recipe, found by globbing, from composing to a loaded adapter: one family of tests for all of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from safetensors.torch import load_file
from torch import Tensor

from loramoe_train.experts import bank as bank_module
from loramoe_train.experts.mixed_block import MixedBlock
from loramoe_train.planning import make_counts
from loramoe_train.schema.run import RunConfig
from loramoe_train.validation import trains_base
from tests.composing import RECIPE_NAMES, composed
from tests.conftest import make_falcon_mamba, make_llama, write_base
from tests.recipe_passes import CASES, enter_stage, make_routed, one_pass
from tests.recipe_runs import Ready, changed, differing, get_ready, logits_of, short_run
from tests.recipe_worker import train
from tests.test_routed_model import ids_of
from tests.training.processes import ROOT, read_until
from tests.training.test_parallel import check_close

every_recipe = pytest.mark.parametrize("recipe", RECIPE_NAMES)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Ran:
    """A finished short run on the embedded model and data. Do not train it further."""

    run_dir: Path
    ready: Ready
    before: dict[str, Tensor]  # adapter tensors at the start
    base: dict[str, Tensor]  # everything else in the model, at the start

    def log(self) -> list[dict[str, Any]]:
        return lines_of(self.run_dir)


@pytest.fixture(scope="module", params=RECIPE_NAMES)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp(request.param)
    ready = get_ready(short_run(request.param, folder, "experts.dropout=0.05"))
    before = ready.weights()
    stored = {tensor.data_ptr() for tensor in ready.parts.parts.adapter_tensors().values()}
    state = ready.routed.model.state_dict()
    base = {name: tensor.clone() for name, tensor in state.items() if tensor.data_ptr() not in stored}
    ready.train(folder / "run")
    return Ran(folder / "run", ready, before, base)


# -- on the embedded model ---------------------------------------------------------------------------------------------


def test_it_learns_and_moves_what_it_trains_alone(ran):
    losses: dict[str, list[float]] = {}
    for entry in ran.log():
        if entry["kind"] == "train":
            losses.setdefault(entry["stage"], []).append(entry["loss"])
    assert list(losses) == list(ran.ready.config.trainer.stages)
    for stage, values in losses.items():
        assert values[-1] < values[0], (stage, values)
    trained = {kind for stage in ran.ready.config.trainer.stages.values() for kind in stage.train}
    groups = ran.ready.routed.groups
    wanted = {n for kind in trained for n, p in groups[kind].items() if p.numel() and not _is_lonely(ran, n)}
    after = ran.ready.weights()
    assert set(differing(ran.before, after)) == wanted
    state = ran.ready.routed.model.state_dict()
    assert differing(ran.base, {name: state[name] for name in ran.base}) == []


def _is_lonely(ran: Ran, name: str) -> bool:
    """The router of a single expert has nothing to learn."""
    site, routers, _ = name.partition(".router.")
    return bool(routers) and site in ran.ready.routed.plan and ran.ready.routed.plan[site].num_experts == 1


def test_the_plan_counts_what_trains(ran):
    """`loramoe-plan`, from shapes alone, and the parameters that this run had in its stages."""
    counts = make_counts(ran.ready.config)[0]
    trained = {kind for stage in ran.ready.config.trainer.stages.values() for kind in stage.train}
    groups = ran.ready.routed.groups
    assert counts.trained == sum(p.numel() for kind in trained for p in groups[kind].values()) > 0


def test_resumed_in_the_middle_it_is_the_same_run(ran, tmp_path):
    again = get_ready(ran.ready.config)
    torch.manual_seed(7)  # whatever happened in between
    again.train(tmp_path / "run", resume=ran.run_dir / "checkpoints" / "step_000002")
    assert differing(ran.ready.weights(), again.weights()) == []


@pytest.fixture(scope="session")
def other_process() -> Iterator[Callable[[Path, Tensor, Path], Tensor]]:
    """Logits of a finished run, computed in a process that knows nothing but its folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    worker = subprocess.Popen([sys.executable, "-m", "tests.recipe_worker", "load"], cwd=ROOT, env=environment, **pipes)

    def ask(folder: Path, ids: Tensor, out: Path) -> Tensor:
        worker.stdin.write(json.dumps({"folder": str(folder), "ids": ids.tolist(), "out": str(out)}) + "\n")
        worker.stdin.flush()
        read_until(worker, "done")
        return load_file(out)["logits"]

    yield ask
    worker.communicate(timeout=60)  # the end of its input ends it


def test_a_new_process_loads_the_same_model(ran, other_process, tmp_path):
    ids = ids_of(rows=2, length=12)
    ours = logits_of(ran.ready.routed, ids)
    if ran.ready.routed.plan:  # else the base itself was trained
        with ran.ready.routed.context.override("off"):
            assert not torch.equal(ours, logits_of(ran.ready.routed, ids))
    brought = [Path(path) for path in ran.ready.config.experts.adapters]
    for path in brought:  # a run needs none of the adapters that it began with
        path.rename(path.with_suffix(".moved"))
    theirs = other_process(ran.run_dir, ids, tmp_path / "out.safetensors")
    for path in brought:
        path.with_suffix(".moved").rename(path)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


# -- on random models of a few thousand parameters ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])
@every_recipe
def test_with_a_cache_it_says_what_it_says_without(recipe, kind, tmp_path):
    """Token by token, and in a generation loop."""
    routed, _ = make_routed(recipe, kind, tmp_path)
    ids, cache = ids_of(rows=2), "past_key_values" if kind == "llama" else "cache_params"
    serving = {"task": 1, "domain": 1}
    with torch.no_grad(), routed.context.serving(**serving, prompt=3):
        full = routed.model.eval()(ids, use_cache=False).logits
        out = routed.model(ids[:, :3], use_cache=True)
        steps = [out.logits]
        for position in range(3, ids.shape[1]):
            out = routed.model(ids[:, position : position + 1], use_cache=True, **{cache: out[cache]})
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), routed.context.serving(**serving, prompt=ids.shape[1]):
        told = {"max_new_tokens": 5, "do_sample": False}
        spoken = [routed.model.generate(ids, use_cache=use, **told) for use in (True, False)]
    assert torch.equal(*spoken) and spoken[0].shape[1] > ids.shape[1]


@pytest.mark.parametrize("case", CASES)
def test_grouped_it_computes_what_it_does_concatenated(case, tmp_path, monkeypatch):
    recipe, stage = CASES[case]
    calls, add_grouped = [], bank_module.add_grouped
    monkeypatch.setattr(bank_module, "add_grouped", lambda *args: (calls.append(1), add_grouped(*args))[1])
    found, used = [], []
    for form in ("concatenated", "grouped"):
        (tmp_path / form).mkdir()
        routed, config = make_routed(recipe, "llama", tmp_path / form, f"experts.form={form}")
        enter_stage(routed, config, stage)
        mixed = tuple(f"{name}." for name, block in routed.blocks.items() if isinstance(block, MixedBlock))
        alone = [layer for site, layer in routed.layers.items() if not site.startswith(mixed)]  # called for themselves
        sparse = [layer for layer in alone if _leaves_experts_out(layer)]
        found.append(one_pass(routed, config, stage))
        used.append(len(calls))
    assert used[0] == 0 and (used[1] > 0) == bool(sparse)
    one, other = found
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-5, atol=0)
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        scale = float(gradient.abs().max()) if gradient.numel() else 0.0
        tolerance = {"rtol": 0, "atol": 1e-5 * scale, "msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(other.gradients[name], gradient, **tolerance)


def _leaves_experts_out(layer: Any) -> bool:
    """Whether the grouped form can serve a site at all: few experts of each token, all of one rank."""
    most = layer.most_experts()
    alike = len(set(layer.bank.ranks)) == 1 and layer.bank.down_per_expert
    return alike and most is not None and most < layer.bank.num_experts


# batches that two ranks cannot halve, from as many examples as no number of batches takes; and more experts than tokens
# of a rank ask for, each computed for its own tokens alone
ODD = {
    "uneven": ("lora_mixer", 9, 9, 5, ()),
    "accumulated": ("mola", 7, 2, 2, ("experts.form=grouped", "experts.layout=32", "router.top_k=1")),
    "packed": ("dynmole", 7, 2, 2, ("data.packing=true", "data.max_length=128")),
}


@pytest.mark.slow
@pytest.mark.parametrize("shared_out", ["one of a kind", pytest.param("all", marks=pytest.mark.nightly)])
def test_two_processes_train_as_one(shared_out, tmp_path):
    """All recipes in one pair of processes, on a random model in float64; the same in this process. With the base
    shared out, too: one recipe of every kind, or all."""
    # wide enough that no gradient is so small that AdamW, which divides by its size, shows how sums were rounded
    facts = {"pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    base = write_base(tmp_path / "base", make_llama, num_hidden_layers=4, **facts)
    own = ("experts.dropout=0", "experts.rank=2", "trainer.max_steps=4", f"model.path={base}")
    jobs: dict[str, list[dict[str, Any]]] = {"one": [], "ddp": [], "fsdp2": []}

    def add(kind: str, name: str, config: RunConfig, rows: int) -> None:
        trainer = {"micro_batch_size": rows} | ({} if kind == "one" else {"parallel": kind})
        plain = changed(config, "trainer", **trainer).plain()
        jobs[kind].append({"config": plain, "run_dir": f"{tmp_path}/{name}/{kind}"})

    kinds = set()
    for recipe in RECIPE_NAMES:
        (tmp_path / recipe).mkdir()
        config = short_run(recipe, tmp_path / recipe, *own, "trainer.batch_size=8")
        # a step is one micro-batch: of which examples it would be made up else depends on the number of processes
        add("one", recipe, config, 8)
        add("ddp", recipe, config, 4)
        kind = (config.router.scope, config.experts.mixing, get_class(config.experts.make["_target_"]).reads_base)
        if not trains_base(config) and (kind not in kinds or shared_out == "all"):
            kinds.add(kind)
            add("fsdp2", recipe, config, 4)
    for name, (recipe, batch, alone, together, more) in ODD.items():
        config = short_run(recipe, tmp_path, *own, f"trainer.batch_size={batch}", *more)
        add("one", name, config, alone)
        add("ddp", name, config, together)
    space = write_base(tmp_path / "space", make_falcon_mamba)
    model = (*own, "model=falcon_mamba_7b", "model.dtype=float32", f"model.path={space}", "trainer.batch_size=8")
    for kind, rows in (("one", 8), ("ddp", 4), ("fsdp2", 4)):
        add(kind, "state_space", short_run("lora_mixer", tmp_path, *model), rows)
    running = start_pair(jobs["ddp"] + jobs["fsdp2"], tmp_path / "jobs.json")
    train(jobs["one"])
    _, errors = running.communicate(timeout=600)
    assert running.returncode == 0, errors[-4000:]
    assert len(jobs["ddp"]) == len(jobs["one"]) > len(jobs["fsdp2"]) >= 5
    for job in jobs["ddp"] + jobs["fsdp2"]:
        run_dir = Path(job["run_dir"])
        check_close(run_dir.parent / "one", run_dir, numbers_at_least=40)
    (*_, routing) = (line for line in lines_of(tmp_path / "accumulated" / "ddp") if line["kind"] == "routing")
    idle = [0 in site["load"] for site in routing["sites"].values()]
    assert sum(idle) > len(idle) / 2  # somewhere, an expert without a token: the runs above were about that, too


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def start_pair(jobs: list[dict[str, Any]], file: Path) -> subprocess.Popen:
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*launcher, "-m", "tests.recipe_worker", "train", str(file)], cwd=ROOT, env=environment, **pipes
    )


# -- the recipes themselves --------------------------------------------------------------------------------------------


@every_recipe
def test_its_losses_can_be_turned_off(recipe):
    """What a recipe sets of a loss goes with the loss."""
    stages = composed(f"+recipe={recipe}").trainer.stages
    if not any(stage.aux_loss for stage in stages.values()):  # else a stage asks for one by name
        assert composed(f"+recipe={recipe}", "aux_loss=none").aux_loss == {}
