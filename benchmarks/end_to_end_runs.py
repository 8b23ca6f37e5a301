"""One run of one candidate of `end_to_end`: our trainer, or TRL's, in a process of its own, with a meter in it."""

import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.shapes import Mixture, routed_config

TASKS = ("gsm8k", "arc_easy", "arc_challenge", "sst2")
SITES = ("q_proj", "k_proj", "v_proj", "o_proj")
# `rows` is the number of examples in a forward pass (of a packed candidate: of rows); the rest are its own options
OURS: dict[str, dict[str, Any]] = {
    "ours": {"rows": 4},
    "ours_packed": {"rows": 1, "data.packing": "true"},
}
PEERS: dict[str, dict[str, Any]] = {
    "trl_padded": {"rows": 8},
    "trl_single": {"rows": 1},
    "trl_grouped": {"rows": 4, "train_sampling_strategy": "group_by_length"},
    "trl_flat": {"rows": 4, "padding_free": True, "max_length": None},
    "trl_packed": {"rows": 1, "packing": True, "packing_strategy": "bfd"},
}


@dataclass(frozen=True)
class Settings:
    """What all candidates of a run share."""

    data_root: str
    model: str
    dtype: str = "float32"
    batch_size: int = 16  # examples per optimizer step
    max_length: int = 512  # tokens
    lr: float = 2e-4
    steps: int = 12
    warmup: int = 2  # steps that are not counted
    autocast: bool = False
    check: bool = False  # the loss of the first step's examples instead of a run
    started: float = 0.0  # time.time() at which the process was asked for


class Meter:
    """Collects, per forward pass, what it held, and when each optimizer step began."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, int, int, int]] = []  # examples, supervised, real and padded tokens
        self.begins: list[float] = []
        self.first_pass: list[int] = []  # of each step
        self.epoch = 0.0

    def step(self) -> None:
        self.epoch = self.epoch or time.time()
        self.begins.append(time.perf_counter())

    def result(self, settings: Settings, passes_of_step: list[int]) -> dict[str, Any]:
        """`begins` has one entry more than there are steps: the end of the last."""
        from loramoe_train.training.memory import peak_resident  # imports torch, whose time belongs to the candidates

        ends = [sum(passes_of_step[: s + 1]) for s in range(len(passes_of_step))]
        steps = [self.passes[end - size : end] for end, size in zip(ends, passes_of_step, strict=True)]
        seconds = self.begins[-1] - self.begins[settings.warmup]
        counted = [entry for step in steps[settings.warmup :] for entry in step]
        _, _, counted_real, counted_padded = (sum(column) for column in zip(*counted, strict=True))
        # full rows hold other examples in the counted steps than padded ones do, but the same in the whole run
        examples, supervised, real, _ = (sum(column) for column in zip(*self.passes, strict=True))
        tokens_per_s = counted_real / seconds
        return {
            "startup_s": self.epoch - settings.started,
            "first_step_s": self.begins[1] - self.begins[0],
            "steps": len(steps) - settings.warmup,
            "seconds": seconds,
            "examples_per_s": tokens_per_s * examples / real,
            "supervised_tokens_per_s": tokens_per_s * supervised / real,
            "useful_share": counted_real / counted_padded,
            "passes_per_step": statistics.mean(passes_of_step),
            "peak_rss_mib": peak_resident() / 2**20,
        }


# -- our side ----------------------------------------------------------------------------------------------------------


def our_config(settings: Settings, **changes: Any) -> Any:
    return routed_config(
        Mixture(),
        f"model.path={settings.model}",
        f"model.dtype={settings.dtype}",
        f"data.tasks=[{','.join(TASKS)}]",
        f"data.root={settings.data_root}",
        "data.sampling.strategy=equal",
        "data.validation_examples=0",
        f"data.max_length={settings.max_length}",
        f"trainer.batch_size={settings.batch_size}",
        f"trainer.max_steps={settings.steps}",
        f"trainer.lr={settings.lr}",
        "trainer.router_lr=null",
        "trainer.schedule=constant",
        "trainer.warmup_fraction=0",
        f"trainer.mixed_precision={'bf16' if settings.autocast else 'no'}",
        "eval.enabled=false",
        *(f"{key}={value}" for key, value in changes.items()),
    )


class _MeteredStage:
    """A stage's batches, with a note of when each step is asked for and what it holds."""

    def __init__(self, stage: Any, meter: Meter, passes_of_step: list[int]) -> None:
        self._stage, self._meter, self._passes = stage, meter, passes_of_step

    def steps(self, **where: int) -> Iterator[Any]:
        batches = self._stage.steps(**where)
        while True:
            self._meter.step()
            step = next(batches, None)
            if step is None:
                return
            self._passes.append(len(step))
            for batch in step:
                counts = (len(batch.example_ids), batch.num_supervised(), int(batch.valid.sum()), batch.valid.numel())
                self._meter.passes.append(counts)
            yield step


def run_ours(settings: Settings, name: str, *, profile: bool = False) -> dict[str, Any]:
    """One run of our trainer through the same functions as `loramoe-train`."""
    from loramoe_train.run import on_cpu, prepare
    from loramoe_train.settle import settle
    from loramoe_train.training.accelerator import make_accelerator
    from loramoe_train.training.loop import fit

    own = dict(OURS[name])
    changes = {"trainer.micro_batch_size": own.pop("rows"), **own}
    config = our_config(settings, **changes, **({"trainer.max_steps": 1} if settings.check else {}))
    meter, passes_of_step = Meter(), []
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.trainer, Path(folder), cpu=on_cpu())
        ready = prepare(config, settle(config), device=accelerator.device)
        parts, found = ready.parts, {}

        def stage_data(stage: str) -> _MeteredStage:
            return _MeteredStage(parts.stage_data(stage), meter, passes_of_step)

        def adapter_tensors() -> Mapping[str, Any]:  # the last step has ended when the checkpoint begins
            if len(meter.begins) == len(passes_of_step):
                meter.step()
                found.update(meter.result(settings, passes_of_step) if not settings.check else {})
            return parts.adapter_tensors()

        profiler = cProfile.Profile() if profile else None
        if profiler:
            profiler.enable()
        metered = replace(parts, stage_data=stage_data, adapter_tensors=adapter_tensors)
        summary = fit(metered, accelerator, config.trainer, ready.stages, run_dir=Path(folder), seed=0)
        if profiler:
            profiler.disable()
            found["profile"] = profile_table(profiler, len(passes_of_step))
    if settings.check:
        return {"loss": summary.stages[-1].loss, "supervised": sum(entry[1] for entry in meter.passes)}
    return found


def profile_table(profiler: Any, steps: int) -> list[dict[str, Any]]:
    """Seconds per step, with everything called from there, of our functions and of torch's entry points to backward
    and to the optimizer; the longest first."""
    rows = []
    for (file, line, function), (_, calls, _, total, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        ours = "loramoe_train" in file
        if (ours or function in ("run_backward", "_engine_run_backward", "step")) and total / steps > 1e-4:
            place = f"{file.rpartition('loramoe_train/')[2] if ours else Path(file).name}:{line}"
            rows.append({"where": f"{place} {function}", "calls": calls / steps, "seconds": total / steps})
    return sorted(rows, key=lambda row: -row["seconds"])[:40]


# -- the peer ----------------------------------------------------------------------------------------------------------


def rendered_pairs(settings: Settings, tokenizer: Any, count: int) -> list[dict[str, str]]:
    """The first `count` samples of our plan as text."""
    from loramoe_train.data.build import build_mixture

    config = our_config(settings)
    mixture = build_mixture(config.data, tokenizer, seed=config.seed)
    plan = mixture.plan(config.data.sampling, stage="train", total=count, examples=sum(mixture.sizes.values()))
    pairs = []
    for task, row in plan.slice(0, count):
        data = mixture.tasks[task]
        prompt, answer = data.renderer(data.rows[row], data.rows.where(row)).segments
        pairs.append({"prompt": prompt.text, "completion": answer.text})
    return pairs


def run_trl(settings: Settings, name: str) -> dict[str, Any]:
    """One run of SFTTrainer with plain LoRA of rank 16."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    options = {"max_length": settings.max_length, "train_sampling_strategy": "sequential", **PEERS[name]}
    rows = options.pop("rows")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    pairs = rendered_pairs(settings, tokenizer, settings.batch_size * (1 if settings.check else settings.steps))
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    packed, meter = options.get("packing", False), Meter()

    class Stamps(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **facts: Any) -> None:
            meter.step()

        def on_train_end(self, *arguments: Any, **facts: Any) -> None:
            meter.step()

    with tempfile.TemporaryDirectory() as folder:
        make = dict(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=settings.batch_size // rows,
            num_train_epochs=1,
            learning_rate=settings.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=1.0,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=settings.autocast,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
            **options,
        )
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(SITES), task_type="CAUSAL_LM")
        if packed and not settings.check:  # rows per step, so that a step has the tokens of `batch_size` examples
            tokens = sum(len(tokenizer(p["prompt"] + p["completion"])["input_ids"]) + 1 for p in pairs)
            make["gradient_accumulation_steps"] = max(1, round(tokens / settings.steps / settings.max_length / rows))
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**make),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Stamps()],
        )
        collate = trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(examples)
            real = sum(len(example["input_ids"]) for example in examples)
            supervised = int((batch["labels"][:, 1:] != -100).sum())
            held = sum(len(example["seq_lengths"]) if packed else 1 for example in examples)
            meter.passes.append((held, supervised, real, batch["input_ids"].numel()))
            return batch

        trainer.data_collator = counted
        if settings.check:
            return common_loss(trainer)
        trainer.train()
    size, steps = make["gradient_accumulation_steps"], len(meter.begins) - 1
    passes_of_step = [min(size, len(meter.passes) - size * step) for step in range(steps)]
    return meter.result(settings, passes_of_step)


def common_loss(trainer: Any) -> dict[str, Any]:
    """The fresh model's loss over the whole (small) data set, in the very batches that it would train on."""
    import torch

    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    count = torch.tensor(supervised)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) for batch in batches]
    return {"loss": float(sum(losses)), "supervised": supervised}
