"""The context: open, closed, nested; fixed decisions."""

import pytest
import torch

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.fixed import domain_routing, domain_table
from loramoe_train.routing.types import Routing, Tokens

TOKENS = Tokens(*(torch.ones(2, dtype=torch.long),) * 4)


def test_nesting_is_refused_and_closing_clears():
    context = RoutingContext()
    with context.open(TOKENS) as records:
        context.record("a", Routing(torch.ones(2, 1)))
        assert list(records) == ["a"]
        with pytest.raises(RuntimeError, match="open already"), context.open(TOKENS):
            pass
        assert context.is_open
    assert not context.is_open and context.records == {}
    with pytest.raises(RuntimeError, match="closed"):
        _ = context.tokens


def test_an_error_inside_closes_the_context_and_restores_the_mode():
    context = RoutingContext()
    with pytest.raises(ZeroDivisionError), context.override("off"), context.open(TOKENS):
        _ = 1 / 0
    assert not context.is_open and context.mode == "learned"


def test_recomputation_overwrites_its_record():
    context = RoutingContext()
    with context.open(TOKENS) as records:
        first, second = Routing(torch.ones(2, 1)), Routing(torch.zeros(2, 1))
        context.record("a", first)
        context.record("a", second)
        assert records["a"] is second and len(records) == 1


@pytest.mark.parametrize(("domains", "experts"), [(1, 1), (5, 5), (5, 2), (2, 5), (3, 8)])
def test_every_expert_has_a_domain_and_weights_sum_to_one(domains, experts):
    table = domain_table(domains, experts)
    torch.testing.assert_close(table.sum(dim=1), torch.ones(domains))
    assert (table.sum(dim=0) > 0).all()
    if domains == experts:
        assert torch.equal(table, torch.eye(domains))


def test_padding_uses_no_expert():
    routing = domain_routing(torch.tensor([1, -1]), 2, 2)
    assert routing.weights_NE.tolist() == [[0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(("domains", "experts"), [(1, 1), (5, 5), (5, 2), (2, 5), (3, 8)])
def test_the_chosen_of_a_domain_are_its_weights(domains, experts):
    routing = domain_routing(torch.arange(-1, domains), domains, experts)
    chosen = routing.chosen
    assert chosen.experts_NK.shape == (domains + 1, -(-experts // domains))
    assert torch.equal(torch.zeros(domains + 1, experts).scatter(1, *vars(chosen).values()), routing.weights_NE)
    assert all(len(set(row)) == len(row) for row in chosen.experts_NK.tolist())
