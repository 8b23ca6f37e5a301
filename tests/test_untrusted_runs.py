"""Checkpoints and run folders of a stranger: what their files name stays inside, what their state says is checked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramoe_train.errors import ConfigError, LoramoeError
from loramoe_train.files import sha256, write_json
from loramoe_train.rundir import RESOLVED, check_claim
from loramoe_train.training.checkpoint import MANIFEST as LISTING
from loramoe_train.training.checkpoint import fault, find_latest, read_checkpoint, write_checkpoint
from tests.composing import composed
from tests.training.harness import make_parts, make_trainer, train

DEEP = "[" * 100_000


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(run_dir: Path, state: dict | None = None) -> Path:
    weights = {"x": torch.ones(2)}
    return write_checkpoint(
        run_dir,
        3,
        save_adapter=lambda folder: save_file(weights, folder / "adapter.safetensors"),
        tensors={"optimizer": weights},
        state=state or {"step": 3},
    )


def relist(path: Path, name: str, target: Path) -> None:
    """List a further file, with what its size and checksum really are."""
    listing = json.loads((path / LISTING).read_text())
    listing["files"][name] = {"bytes": target.stat().st_size, "sha256": sha256(target)}
    write_json(path / LISTING, listing)


@pytest.mark.parametrize("how", ["parent", "absolute", "link", "linked folder", "through a folder"])
def test_a_checkpoint_that_names_files_outside(how, tmp_path):
    path, outside = checkpoint(tmp_path / "run"), tmp_path / "private"
    outside.mkdir()
    secret = outside / "x"
    secret.write_text("mine")
    name = {"parent": "../../../private/x", "absolute": str(secret), "through a folder": "state/../../../../private/x"}
    if how == "link":
        (path / "x").symlink_to(secret)
    elif how == "linked folder":
        (path / "more").symlink_to(outside)
    relist(path, {**name, "link": "x", "linked folder": "more/x"}[how], secret)
    assert "is not a plain file inside it" in fault(path)
    with pytest.raises(LoramoeError, match="cannot be used: its manifest names"):
        read_checkpoint(path)
    assert find_latest(tmp_path / "run") is None


@pytest.mark.parametrize(
    "content",
    [DEEP, "[]", '{"files": []}', '{"format": 1, "files": {"x": 3}}', "{", '{"format": 1, "files": {"": {}}}'],
)
def test_a_manifest_of_nonsense(content, tmp_path):
    path = checkpoint(tmp_path)
    (path / LISTING).write_text(content)
    assert fault(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The run folder of a short run, stopped in its first stage."""
    run_dir = tmp_path_factory.mktemp("real")
    train(make_parts(), make_trainer(checkpoint_every=1, keep=10), run_dir)
    return run_dir


STATES = {
    "empty": lambda s: s.clear(),
    "no history": lambda s: s.pop("history"),
    "history of nonsense": lambda s: s.update(history=[{"x": 1}]),
    "no stages": lambda s: s.update(stages=[]),
    "stage": lambda s: s.update(stage="../../x"),
    "window": lambda s: s["stage_state"].update(window={"x": 1}),
    "optimizer": lambda s: s.update(optimizer=[1]),
    "generators": lambda s: s.update(rng=[{"python": [3, [1, 2], None], "numpy": ["x", 0, 0, 0.0]}]),
    "no generators": lambda s: s.pop("rng"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_checkpoint_whose_checksums_fit_and_whose_state_is_nonsense(case, real, tmp_path):
    run_dir = Path(shutil.copytree(real, tmp_path / "run"))
    path = run_dir / "checkpoints" / "step_000001"
    state = json.loads((path / "state" / "trainer.json").read_text())
    STATES[case](state)
    write_json(path / "state" / "trainer.json", state)
    relist(path, "state/trainer.json", path / "state" / "trainer.json")
    with pytest.raises(LoramoeError) as caught:
        train(make_parts(), make_trainer(checkpoint_every=1, keep=10), tmp_path / "new", resume=path)
    assert str(path) in str(caught.value)


def test_optimizer_moments_of_another_size(real, tmp_path):
    path = Path(shutil.copytree(real / "checkpoints" / "step_000001", tmp_path / "step_000001"))
    file = path / "state" / "optimizer.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("exp_avg"))
    tensors[name] = torch.zeros(1)
    save_file(tensors, file)
    relist(path, "state/optimizer.safetensors", file)
    with pytest.raises(ConfigError, match=r"exp_avg of .* has shape \(1,\)"):
        train(make_parts(), make_trainer(checkpoint_every=1, keep=10), tmp_path / "new", resume=path)


LINKS = ["metrics.jsonl", f"{RESOLVED}.tmp", "results.json.tmp", "adapter.tmp", "checkpoints", "samples", "wandb"]


@pytest.mark.parametrize("name", [*LINKS, "checkpoints/step_000004.tmp", "checkpoints/step_000003/state"])
def test_a_run_folder_with_a_link_that_leads_out(name, tmp_path):
    run_dir, outside = tmp_path / "run", tmp_path / "private"
    run_dir.mkdir()
    outside.mkdir()
    (outside / "x").write_text("mine")
    (run_dir / RESOLVED).write_text("{}")
    link = run_dir / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside if "." not in name.replace(".tmp", "") else outside / "x")
    config = composed("+recipe=lora").model_copy(update={"resume": "auto", "run_dir": str(run_dir)})
    with pytest.raises(ConfigError, match="is a link that leads out of the folder"):
        check_claim(run_dir, config)
    assert tree(outside) == {"x": b"mine"}


def test_links_that_stay_inside_are_fine(tmp_path):
    run_dir = tmp_path / "real"
    (run_dir / "wandb" / "run-1").mkdir(parents=True)
    (run_dir / RESOLVED).write_text("{}")
    (run_dir / "wandb" / "latest-run").symlink_to("run-1")
    (run_dir / "wandb" / "debug-core.log").symlink_to("/var/log/wandb.log")  # as wandb makes it
    (run_dir / "latest").symlink_to(RESOLVED)
    (tmp_path / "run").symlink_to(run_dir)  # the folder itself may be anywhere
    config = composed("+recipe=lora").model_copy(update={"resume": "auto"})
    with pytest.raises(ConfigError, match="was started otherwise"):  # another config: so the links were passed
        check_claim(tmp_path / "run", config)


def test_names_of_stages_and_tasks_become_no_paths(tmp_path):
    """Files are called by number, step and benchmark."""
    odd = "../../../x"
    trainer = make_trainer(stages={odd: {"steps": 2}, "/y": {"steps": 1}}, eval_every=1, log_every=1)
    parts = make_parts()
    parts = replace(parts, task_names=tuple(f"{odd}/{name}" for name in parts.task_names))
    before = {path for path in tmp_path.parent.rglob("*")}
    train(parts, trainer, tmp_path / "run")
    written = {path for path in tmp_path.parent.rglob("*")} - before
    assert written and all(path.is_relative_to(tmp_path / "run") for path in written)
    assert odd in (tmp_path / "run" / "metrics.jsonl").read_text()
