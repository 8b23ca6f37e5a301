"""What every router promises, as one function that the tests of each router call."""

from collections.abc import Callable

import torch
from torch import nn

from loramoe_train.routing.context import RoutingContext


def check_router(
    make: Callable[[int, int], nn.Module],
    *,
    sums_to_one: bool = True,
    seeds: int = 3,
    make_context: Callable[[], RoutingContext] = RoutingContext,
) -> None:
    """Finite non-negative float32 weights; a token ignores its neighbours; gradient reaches every parameter."""
    for seed in range(seeds):
        for tokens, d_in, experts in ((0, 4, 3), (1, 4, 1), (7, 6, 5)):
            torch.manual_seed(seed)
            router, context = make(d_in, experts), make_context()
            for parameter in router.parameters():
                nn.init.normal_(parameter)
            x = torch.randn(tokens, d_in)
            for training in (True, False):
                router.train(training)
                w = router(x, context).weights_NE
                assert w.shape == (tokens, experts) and w.dtype == torch.float32
                assert torch.isfinite(w).all() and (w >= 0).all()
                if sums_to_one:
                    torch.testing.assert_close(w.sum(dim=-1), torch.ones(tokens))
                alone = [router(x[n : n + 1], context).weights_NE for n in range(tokens)]
                torch.testing.assert_close(torch.cat(alone) if alone else w, w)
                assert router(x.bfloat16(), context).weights_NE.dtype == torch.float32
            if tokens > 1 and experts > 1:
                router.train()
                total = (router(x, context).weights_NE * torch.randn(tokens, experts)).sum()
                if total.requires_grad:  # else there is nothing to learn
                    total.backward()
                for name, parameter in router.named_parameters():
                    assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
