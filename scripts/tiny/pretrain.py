"""Pretraining of the tiny base: a Llama of about three million parameters on the generated corpus.

Plain next-token prediction with AdamW and a cosine schedule, bfloat16 autocast over float32 weights. Each row of a batch
starts at the beginning of a document, as task prompts do, and is filled up with further documents. The same seed, thread
count and torch build give the same weights; on another machine the last digits may differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import corpus


@dataclass(frozen=True)
class Plan:
    steps: int = 2600
    batch: int = 16  # rows; small, because so small a model learns more from many steps than from large ones
    length: int = 128  # tokens per row
    peak_lr: float = 2.5e-3
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
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(corpus.END),
        pad_token_id=tokenizer.token_to_id("<|pad|>"),
    )


def batches(tokenizer: Tokenizer, plan: Plan, seed: int) -> Iterator[torch.Tensor]:
    """Token ids (batch, length); documents are separated by the end token."""
    stream, end = corpus.documents(seed), tokenizer.token_to_id(corpus.END)
    while True:
        rows = []
        for _ in range(plan.batch):
            ids: list[int] = []
            while len(ids) < plan.length:
                ids += [*tokenizer.encode(next(stream)).ids, end]
            rows.append(ids[: plan.length])
        yield torch.tensor(rows)


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
    print(
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {plan.steps * plan.batch * plan.length:,} tokens",
        flush=True,
    )
    started, running = time.time(), 0.0
    for done, ids in zip(range(plan.steps), batches(tokenizer, plan, seed=10 + plan.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, done)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if done == 0 else 0.98 * running + 0.02 * loss.item()
        if (done + 1) % 100 == 0 or done + 1 == plan.steps:
            print(f"step {done + 1}  loss {running:.3f}  {time.time() - started:.0f} s", flush=True)
    print(f"loss on fresh documents: {fresh_loss(model, tokenizer, plan):.4f}", flush=True)
    return model


@torch.no_grad()
def fresh_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, plan: Plan, count: int = 10) -> float:
    """Mean loss over `count` batches of a stream that was not trained on, in float32."""
    model.eval()
    losses = [
        model(input_ids=ids, labels=ids, use_cache=False).loss.item()
        for _, ids in zip(range(count), batches(tokenizer, plan, seed=2))
    ]
    model.train()
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """bfloat16 halves the file; loading in float32 gives the rounded values back exactly."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)
