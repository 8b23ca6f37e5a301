"""The twins of methods whose experts are weighed by the example's task alone, whatever its tokens are."""

from torch import Tensor

from tests.twins.per_linear import ATTENTION, FFN, MIXER, PerLinear, Token, softmax
from tests.twins.token_routed import BOTH, number, one_per_domain


def own_task(token: Token) -> tuple[list[float], None]:
    """Hard: the expert of the example's task, with weight 1."""
    return [float(e == token.task) for e in range(token.experts)], None


def task_gate(token: Token) -> tuple[list[Tensor], list[Tensor]]:
    """p = softmax(W v_t), v_t the 64 numbers that the linear has learned about task t."""
    weight, embedding = token.router["score.weight"], token.router["score.embedding"]
    v = embedding[token.task]
    assert v.shape == (64,)
    p = softmax([weight[e] @ v for e in range(token.experts)])
    return p, p


TWINS = {
    # 2106.09685, once for each task
    "lora_per_task": PerLinear((*ATTENTION, *MIXER), one_per_domain, [({"experts"}, own_task, None)], own_task),
    # 2310.18339
    "moelora_task": PerLinear((*ATTENTION, *FFN, *MIXER), number(8), [(BOTH, task_gate, None)], task_gate),
}
