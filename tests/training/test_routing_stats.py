"""Routing statistics against loops over tokens."""

import json
from math import log

import pytest
import torch
from accelerate import Accelerator

from loramoe_train.routing.types import Routing, Tokens
from loramoe_train.training import routing_stats as module
from loramoe_train.training.routing_stats import RoutingStats

TASKS = ("a", "b", "c")


def make_tokens(n: int, *, padding: int = 0) -> Tokens:
    task_N = torch.randint(0, 2, (n,))  # task c never occurs
    valid_N = torch.ones(n, dtype=torch.bool)
    if padding:
        task_N[-padding:], valid_N[-padding:] = -1, False
    return Tokens(valid_N, task_N, task_N.clone(), valid_N)


def make_records(n: int, experts: int = 4) -> dict[str, Routing]:
    torch.manual_seed(n)
    sites = ("model.layers.0.q", "model.layers.0.k", "model.layers.1.q")
    records = {site: Routing((torch.randn(n, experts) * 3).softmax(-1)) for site in sites}
    one_hot = torch.nn.functional.one_hot(torch.zeros(n, dtype=torch.long), experts).float()
    return {**records, "model.layers.1.k": Routing(one_hot), "model.layers.1.single": Routing(torch.ones(n, 1))}


def test_numbers_that_are_not_finite_do_not_spoil_the_window() -> None:
    """The step that they belong to may be left out; the other sites of that step count."""
    found = []
    for spoiled in (False, True):
        stats = RoutingStats(TASKS, Accelerator(cpu=True))
        torch.manual_seed(0)
        for n in (7, 5):
            records, tokens = make_records(n), make_tokens(n)
            if spoiled and n == 5:
                records["model.layers.0.q"].weights_NE[2, 1] = float("nan")
            elif not spoiled and n == 5:
                del records["model.layers.0.q"]
            stats.add(records, tokens)
        found.append(stats.fetch()["sites"])
    assert found[0] == found[1]


def test_equal_to_loops() -> None:
    stats = RoutingStats(TASKS, Accelerator(cpu=True))
    seen = []
    for n, padding in ((7, 2), (5, 0)):
        records, tokens = make_records(n), make_tokens(n, padding=padding)
        stats.add(records, tokens)
        seen.append((records, tokens))
    found = stats.fetch()
    assert set(found["sites"]) == set(make_records(1)) - {"model.layers.1.single"}
    use: dict[str, dict[str, list[float]]] = {}
    for site, facts in found["sites"].items():
        use[site] = {task: [0.0] * 4 for task in TASKS}
        entropies = []
        for records, tokens in seen:
            for n in range(len(tokens.valid_N)):
                if not tokens.valid_N[n]:
                    continue
                row = records[site].weights_NE[n].tolist()
                entropies.append(-sum(w * log(w) for w in row if w > 0))
                for expert, weight in enumerate(row):
                    use[site][TASKS[tokens.task_N[n]]][expert] += weight
        total = sum(sum(values) for values in use[site].values())
        load = [sum(use[site][task][e] for task in TASKS) / total for e in range(4)]
        assert facts["load"] == pytest.approx(load, abs=1e-5)
        assert facts["entropy"] == pytest.approx(sum(entropies) / len(entropies) / log(4), abs=1e-5)
        assert facts["top_share"] == pytest.approx(max(load), abs=1e-5)
    assert (
        found["sites"]["model.layers.1.k"]["dead"] == [1, 2, 3] and found["sites"]["model.layers.1.k"]["entropy"] == 0
    )
    for layer, members in (("model.layers.0", ("q", "k")), ("model.layers.1", ("q", "k"))):
        assert set(found["layers"][layer]) == {"a", "b"}
        for task in "ab":
            rows = [use[f"{layer}.{m}"][task] for m in members]
            shares = [sum(row[e] / sum(row) for row in rows) / len(rows) for e in range(4)]
            assert found["layers"][layer][task] == pytest.approx(shares, abs=1e-5)
    assert stats.fetch() is None  # a new window


def test_more_padding_changes_nothing() -> None:
    found = []
    for padding in (0, 6):
        stats = RoutingStats(TASKS, Accelerator(cpu=True))
        records = {site: Routing(r.weights_NE[: 10 + padding]) for site, r in make_records(16).items()}
        tokens = Tokens(*(torch.ones(16, dtype=torch.bool)[: 10 + padding] for _ in range(4)))
        task_N = torch.tensor([0, 1] * 5 + [-1] * padding)
        stats.add(records, Tokens(task_N >= 0, task_N, task_N, tokens.valid_N))
        found.append(stats.fetch())
    assert found[0] == found[1]


def test_a_window_survives_a_checkpoint() -> None:
    whole, first, second = (RoutingStats(TASKS, Accelerator(cpu=True)) for _ in range(3))
    for n in (7, 5):
        whole.add(make_records(n), make_tokens(n))
    torch.manual_seed(5)
    tokens = {n: make_tokens(n) for n in (7, 5)}
    whole.fetch()
    for n in (7, 5):
        whole.add(make_records(n), tokens[n])
    first.add(make_records(7), tokens[7])
    second.load_state(first.state())
    second.add(make_records(5), tokens[5])
    assert json.dumps(second.fetch()) == json.dumps(whole.fetch())


def test_sites_may_come_and_go() -> None:
    """Sums are kept for sites seen together, and belong to each of them: other company, or smaller parts, no matter."""
    whole, parted = (RoutingStats(TASKS, Accelerator(cpu=True)) for _ in range(2))
    records, tokens = make_records(9), make_tokens(9, padding=2)
    for _ in range(3):
        whole.add(records, tokens)
    first, *rest = records
    parted.add(records, tokens)
    parted.add({first: records[first]}, tokens)
    parted.add({site: records[site] for site in rest}, tokens)
    parted.add({site: records[site] for site in reversed(records)}, tokens)
    assert json.dumps(parted.fetch()) == json.dumps(whole.fetch())


def test_many_sites_are_stacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    records, tokens, found = make_records(9), make_tokens(9), []
    for limit in (2**23, 2 * 9 * 4, 1):
        monkeypatch.setattr(module, "STACKED_ELEMENTS", limit)
        stats = RoutingStats(TASKS, Accelerator(cpu=True))
        stats.add(records, tokens)
        found.append(json.dumps(stats.fetch()))
    assert found[0] == found[1] == found[2]


def test_the_number_of_operations_does_not_grow_with_the_sites() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    tokens, counts = make_tokens(8), []
    for sites in (2, 40):
        stats = RoutingStats(TASKS, Accelerator(cpu=True))
        records = {f"layers.{i}": Routing(torch.rand(8, 4)) for i in range(sites)}
        stats.add(records, tokens)
        calls: list[str] = []
        with Counting():
            stats.add(records, tokens)
        counts.append(len(calls))
    assert counts[0] == counts[1], calls


def test_sequence_routing_is_left_out() -> None:
    stats = RoutingStats(TASKS, Accelerator(cpu=True))
    stats.add({"model": Routing(torch.full((2, 4), 0.25))}, make_tokens(8))
    assert stats.fetch() is None
