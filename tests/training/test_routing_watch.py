"""Warnings about routers: told from loads, said when they last, and kept for the summary."""

import io
from dataclasses import replace
from math import log as ln
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loramoe_train.routers.router import Policy, Router
from loramoe_train.schema.trainer import WatchConfig
from loramoe_train.training.checkpoint import find_latest
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.routing_watch import alarms, entropy
from tests.training.harness import MadeUpData, make_batch, make_parts, make_trainer, train
from tests.training.test_loop import read


def line(**loads: list[float]) -> dict:
    return {
        "sites": {
            site: {"load": load, "dead": [e for e, share in enumerate(load) if share < 0.01 / len(load)]}
            for site, load in loads.items()
        }
    }


def test_even_and_peaked_loads() -> None:
    assert entropy([0.25] * 4) == pytest.approx(1.0) and entropy([1.0, 0.0]) == 0.0
    assert entropy([0.5, 0.5, 0.0, 0.0]) == pytest.approx(ln(2) / ln(4))
    assert alarms(line(q=[0.25] * 4, k=[0.7, 0.1, 0.1, 0.1], idle=[0.0] * 4), WatchConfig()) == ()


def test_what_is_said() -> None:
    found = alarms(line(q=[0.97, 0.01, 0.01, 0.01], k=[0.5, 0.5, 0.0, 0.0]), WatchConfig())
    assert found == (
        "the routers of 1 sites have collapsed onto one expert (q: 97% to expert 0)",
        "at 1 sites experts are dead: hardly a token uses them (k: 2, 3)",
    )
    many = alarms(line(**{f"s{i}": [0.5, 0.5, 0.0, 0.0] for i in range(5)}), WatchConfig())
    assert many[0].startswith("at 5 sites") and many[0].endswith("s2: 2, 3; and 2 more sites)")


def test_thresholds() -> None:
    one_of_two = line(q=[0.9, 0.1])
    assert alarms(one_of_two, WatchConfig()) == ()
    assert len(alarms(one_of_two, WatchConfig(top_load=0.9))) == 1
    assert len(alarms(one_of_two, WatchConfig(load_entropy=0.5))) == 1


def collapsing() -> TrainingParts:
    """Routers that give everything to expert 1."""
    parts, only = make_parts(aux={}), Policy(lambda p_NE: torch.arange(3).expand_as(p_NE) == 1, "unit")
    for module in parts.model.modules():
        if isinstance(module, Router):
            module.policies = {True: only, False: only}
    return parts


def test_a_run_says_it_once_it_lasts_and_in_the_end(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), width=300)
    stages = {"s": {"train": ["experts"], "steps": 5}}
    trainer = make_trainer(stages=stages, log_every=1, watch={"patience": 2})
    summary = train(collapsing(), trainer, tmp_path, console=screen)
    told = "the routers of 4 sites have collapsed onto one expert (model.layers.0.self_attn.o_proj: 100% to expert 1"
    shown = screen.file.getvalue()
    assert shown.count(told) == 2  # after two lines of the log, and in the end
    assert told in summary.warnings[0]
    found = read(tmp_path, "routing")
    assert len(found) == 5 and all(told in entry["alarms"][0] for entry in found)
    again = train(collapsing(), trainer, tmp_path, resume=find_latest(tmp_path))
    assert again.warnings == summary.warnings


def test_a_stage_that_routes_by_domain_has_chosen_so(tmp_path: Path) -> None:
    class OneTask(MadeUpData):
        def steps(self, *, start: int, stop: int, **which: int):
            return ([make_batch([3 * s, 3 * s + 3])] for s in range(start, stop))

    parts = replace(make_parts(aux={}), stage_data=lambda name: OneTask(2, 2))
    trainer = make_trainer(stages={"s": {"train": ["experts"], "routing": "by_domain", "steps": 3}}, log_every=1)
    summary = train(parts, trainer, tmp_path)
    assert not any("collapsed" in text for text in summary.warnings)
    assert all(entry["alarms"] == [] for entry in read(tmp_path, "routing"))
