"""Pretraining of the tiny base: a Llama of about three million parameters on the generated corpus.

Next-token prediction with AdamW and a cosine schedule, bfloat16 autocast over float32 weights. A row of a batch is one
document: what stands before a verdict is then about the verdict, which a model of this size learns far sooner than from
packed rows. Rows of similar length go together. Verdict words weigh more in the training loss; the loss on fresh
documents is the plain one. The same seed, thread count and torch build give the same weights.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import corpus
from .tokenizer import PAD


@dataclass(frozen=True)
class Plan:
    steps: int = 2200
    batch: int = 48  # documents; small, because so small a model learns more from many steps than from large ones
    longest: int = 128  # tokens of a document; the rest is cut off
    peak_lr: float = 2.5e-3
    verdict_weight: float = 5.0
    warmup: int = 150  # steps
    weight_decay: float = 0.05
    seed: int = 0
    threads: int = 2


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Four wide layers rather than eight narrow ones: the fewer kernels, the faster on a CPU."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,  # 0.02 suits wide models; here attention would start almost uniform
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(corpus.END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def batches(tokenizer: Tokenizer, plan: Plan, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (batch, longest of the batch) and labels, -100 behind the end token. Sorted within 16 batches."""
    stream, shuffle = corpus.documents(seed), random.Random(seed)
    end, pad = tokenizer.token_to_id(corpus.END), tokenizer.token_to_id(PAD)
    while True:
        pool = [
            [*encoded.ids, end][: plan.longest]
            for encoded in tokenizer.encode_batch([next(stream) for _ in range(16 * plan.batch)])
        ]
        pool.sort(key=len)
        blocks = [pool[at : at + plan.batch] for at in range(0, len(pool), plan.batch)]
        shuffle.shuffle(blocks)
        for block in blocks:
            width = len(block[-1])
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in block])
            yield ids, ids.masked_fill(ids == pad, -100)


def word_weights(tokenizer: Tokenizer, plan: Plan) -> torch.Tensor:
    """Loss weight per token of the vocabulary (V,): 1, or `verdict_weight` for the verdict words."""
    weights = torch.ones(tokenizer.get_vocab_size())
    for word in corpus.VERDICT_WORDS:
        for text in (word, f" {word}"):
            ids = tokenizer.encode(text).ids
            if len(ids) == 1:
                weights[ids[0]] = plan.verdict_weight
    return weights


def learning_rate(plan: Plan, done: int) -> float:
    """Linear warmup, then a cosine down to a hundredth of the peak."""
    if done < plan.warmup:
        return plan.peak_lr * (done + 1) / plan.warmup
    fraction = (done - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))


def pretrain(tokenizer: Tokenizer, plan: Plan) -> LlamaForCausalLM:
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {plan.steps} steps", flush=True)
    weights, tokens = word_weights(tokenizer, plan), 0
    started, running = time.time(), 0.0
    for done, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, plan, seed=10 + plan.seed), plan.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, done)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int((labels != -100).sum())
        running = loss.item() if done == 0 else 0.98 * running + 0.02 * loss.item()
        if (done + 1) % 100 == 0 or done + 1 == plan.steps:
            print(
                f"step {done + 1}  tokens {tokens:,}  weighted loss {running:.3f}  {time.time() - started:.0f} s",
                flush=True,
            )
    print(f"loss on fresh documents: {fresh_loss(model, tokenizer, plan):.4f}", flush=True)
    return model


@torch.no_grad()
def fresh_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, plan: Plan, count: int = 32) -> float:
    """Mean loss over `count` batches of a stream that was not trained on, in float32."""
    model.eval()
    some = itertools.islice(batches(tokenizer, plan, seed=2), count)
    losses = [model(input_ids=ids, labels=labels, use_cache=False).loss.item() for ids, labels in some]
    model.train()
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """bfloat16 halves the file; loading in float32 gives the rounded values back exactly."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)
