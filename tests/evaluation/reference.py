"""Slow obvious twins: one sequence at a time, float64, Python loops, no cache, no padding, no sharing."""

import copy
from typing import Any

import torch


def in_float64(model: Any) -> Any:
    return copy.deepcopy(model).double().eval()


def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Sum of the log-probabilities of the tokens that come after the prompt's."""
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + answer)
    total = 0.0
    for position in range(len(prompt_ids), len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:position]])).logits[0, -1]
        total += float(logits.log_softmax(dim=-1)[ids[position]])
    return total


def generate(model: Any, tokenizer: Any, prompt: str, *, stops: list[str], new_tokens: int) -> str:
    """Greedy decoding without a cache; cut at the first stop string, the end token, or the budget."""
    ids, text = tokenizer.encode(prompt), ""
    start = len(ids)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        if ids[-1] == tokenizer.eos_token_id or any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.split(stop)[0]
    return text
