"""Measures what plain LoRA adds to the base on the test rows: one adapter on q, k, v, o, all five families mixed.

A stand-alone check of the assets that needs nothing of loramoe_train: same prompts and scores as the tasks have
(choices by log-likelihood, the rest by greedy generation and exact match).
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, object]
FAMILIES = ["tiny_math", "tiny_code", "tiny_facts", "tiny_grammar", "tiny_sentiment"]
STOPS = {"tiny_math": ["Question:"], "tiny_code": ["\ndef", "\n#", "\nclass"]}


def read(assets: Path, family: str, split: str) -> list[Row]:
    return [
        json.loads(line)
        for line in (assets / "data" / family / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def prompt_and_choices(family: str, row: Row) -> tuple[str, list[str], int]:
    """The prompt, the possible answers as they follow it, and the index of the right one."""
    if family == "tiny_math":
        return f"Question: {row['question']}\nAnswer:", [f" {row['answer']}"], 0
    if family == "tiny_code":
        return str(row["prompt"]), [str(row["canonical_solution"])], 0
    if family == "tiny_facts":
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        return f"Question: {row['question']}\nAnswer:", [f" {text}" for text in texts], labels.index(row["answerKey"])
    asked, words = {
        "tiny_grammar": ("Does this sentence make sense?", [" no", " yes"]),
        "tiny_sentiment": ("Is this sentence positive or negative?", [" negative", " positive"]),
    }[family]
    return f"{row['sentence']}\nQuestion: {asked}\nAnswer:", words, int(row["label"])


def padded(rows: list[list[int]], fill: int, *, left: bool = False) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor(
        [[fill] * (width - len(row)) + row if left else row + [fill] * (width - len(row)) for row in rows]
    )


@torch.no_grad()
def likelihood_score(model, tokenizer, family: str, rows: list[Row]) -> float:
    """Share of rows whose right choice has the largest summed log-likelihood."""
    hits = 0
    for start in range(0, len(rows), 50):
        sequences, spans, rights = [], [], []
        for row in rows[start : start + 50]:
            prompt, choices, right = prompt_and_choices(family, row)
            head = tokenizer(prompt).input_ids
            tails = [tokenizer(choice).input_ids for choice in choices]
            sequences += [head + tail for tail in tails]
            spans.append([(len(head), len(head) + len(tail)) for tail in tails])
            rights.append(right)
        ids = padded(sequences, tokenizer.pad_token_id)
        logs = model(input_ids=ids).logits.log_softmax(-1)
        scores = logs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        at = 0
        for row_spans, right in zip(spans, rights, strict=True):
            sums = [scores[at + n, first - 1 : last - 1].sum().item() for n, (first, last) in enumerate(row_spans)]
            hits += max(range(len(sums)), key=sums.__getitem__) == right
            at += len(sums)
    return hits / len(rows)


@torch.no_grad()
def generation_score(model, tokenizer, family: str, rows: list[Row], wrong: list[str] | None = None) -> float:
    hits = 0
    for start in range(0, len(rows), 100):
        block = rows[start : start + 100]
        prompts = [tokenizer(prompt_and_choices(family, row)[0]).input_ids for row in block]
        ids = padded(prompts, tokenizer.pad_token_id, left=True)
        out = model.generate(
            input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), max_new_tokens=48, do_sample=False
        )
        for row, generated in zip(block, out[:, ids.shape[1] :], strict=True):
            text = tokenizer.decode(generated, skip_special_tokens=False).split(tokenizer.eos_token)[0]
            for stop in STOPS[family]:
                text = text.split(stop)[0]
            wanted = prompt_and_choices(family, row)[1][0]
            if family == "tiny_math":
                found, right = text.rpartition("####")[2].strip(), wanted.rpartition("####")[2].strip()
                hit = "####" in text and found == right
            else:
                hit = text.strip() == wanted.strip()
            hits += hit
            if wrong is not None and not hit:
                wrong.append(f"{prompt_and_choices(family, row)[0]}|{text!r} wanted {wanted!r}")
    return hits / len(rows)


def scores(model, tokenizer, assets: Path) -> dict[str, float]:
    model.eval()
    made = {}
    for family in FAMILIES:
        score = generation_score if family in STOPS else likelihood_score
        made[family] = score(model, tokenizer, family, read(assets, family, "test"))
    return made


def tune(model, tokenizer, assets: Path, *, steps: int, lr: float, seed: int, batch: int = 32) -> float:
    """Trains in place, every family equally often; returns the mean loss of the last 20 steps."""
    examples = []
    for family in FAMILIES:
        for row in read(assets, family, "train"):
            prompt, choices, right = prompt_and_choices(family, row)
            head, tail = tokenizer(prompt).input_ids, [*tokenizer(choices[right]).input_ids, tokenizer.eos_token_id]
            examples.append((head + tail, [-100] * len(head) + tail))
    random.Random(seed).shuffle(examples)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 20)
    model.train()
    losses = []
    for done in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((done + 1) / warmup, (steps - done) / (steps - warmup))
        at = done * batch % (len(examples) - batch)
        block = examples[at : at + batch]
        ids, labels = (
            padded([example[0] for example in block], tokenizer.pad_token_id),
            padded([example[1] for example in block], -100),
        )
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def check(assets: Path, *, steps: int = 200, lr: float = 4e-3, seeds: tuple[int, ...] = (0, 1)) -> None:
    """Prints one row of scores for the base and one per tuned seed, in per cent."""
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(assets / "model", local_files_only=True)

    def show(title: str, found: dict[str, float], note: str) -> None:
        print(
            f"{title:8s} "
            + "  ".join(f"{family} {100 * value:5.1f}" for family, value in found.items())
            + f"   {note}",
            flush=True,
        )

    for seed in (None, *seeds):
        model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32, local_files_only=True)
        started = time.time()
        if seed is not None:
            torch.manual_seed(seed)
            places = ["q_proj", "k_proj", "v_proj", "o_proj"]
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=places, task_type="CAUSAL_LM"))
            loss = tune(model, tokenizer, assets, steps=steps, lr=lr, seed=seed)
        tuned = time.time()
        found = scores(model, tokenizer, assets)
        note = f"evaluated in {time.time() - tuned:.0f} s"
        show(
            "base" if seed is None else f"seed {seed}",
            found,
            note if seed is None else f"tuned in {tuned - started:.0f} s, loss {loss:.3f}, {note}",
        )
