"""One stage of a run: its optimizer, its steps, and what is due after each of them.

After a step come, in this order: its line in the log, obeying a signal, evaluation, checkpoint. A signal comes before
an evaluation, which may outlast the grace time of a scheduler; the checkpoint then says that it is pending.
"""

from math import isfinite
from pathlib import Path
from signal import SIGINT
from time import perf_counter
from typing import Any, NoReturn

import torch

from loramoe_train.errors import DivergedError, Interrupted, SavedOnSignal
from loramoe_train.training.checkpoint import Checkpoint
from loramoe_train.training.checks import GradientCheck, check_sites_called, unmoved_experts
from loramoe_train.training.compiling import compile_errors
from loramoe_train.training.loss import LossHead
from loramoe_train.training.memory import memory_errors, memory_gib
from loramoe_train.training.metrics import Window
from loramoe_train.training.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    schedule_factor,
    set_learning_rates,
)
from loramoe_train.training.outcome import StepResult, Unread
from loramoe_train.training.parts import AuxTerm
from loramoe_train.training.routing_stats import RoutingStats
from loramoe_train.training.routing_watch import alarms, some_of
from loramoe_train.training.run_state import RunState, StageState, readable_state
from loramoe_train.training.sharding import shard_base, shares
from loramoe_train.training.signals import StopSignals
from loramoe_train.training.stages import StagePlan
from loramoe_train.training.step import TrainingStep
from loramoe_train.training.summary import StageSummary
from loramoe_train.training.validation import EvalResult, evaluate, improves


class StageRun:
    """Sets the model up for a stage, and trains it."""

    def __init__(self, run: RunState, plan: StagePlan, signals: StopSignals) -> None:
        self.run, self.plan, self.signals = run, plan, signals
        parts = run.parts
        parts.context.mode = plan.routing
        for group, members in parts.groups.items():
            for parameter in members.values():
                parameter.requires_grad_(group in plan.train)
                parameter.grad = None
        if run.accelerator.num_processes > 1:
            # what requires gradient has changed, and a data-parallel wrapper looks only once: make a new one
            run.accelerator.free_memory()
        if shares(run.accelerator, run.trainer):
            shard_base(parts, run.accelerator)
        self.wrapped = run.accelerator.prepare(parts.model)
        parts.model.train()
        with parts.context.override("off"):
            self.head = LossHead(parts.model)
        self.optimizer = build_optimizer(run.trainer, plan, parts.groups)
        self.names = {id(p): name for members in parts.groups.values() for name, p in members.items()}
        anchored = parts.groups.get("experts", {}) if plan.anchor > 0 else {}
        self.anchors = {name: parameter.detach().clone() for name, parameter in anchored.items()}
        self.routing_stats = RoutingStats(parts.task_names, run.accelerator, dead_load=run.trainer.watch.dead_load)
        self.state = StageState(Window(len(parts.task_names)))
        self.unread: list[Unread] = []  # steps counted in `state.done` whose numbers are not in its sums yet

    @property
    def step_number(self) -> int:
        """Optimizer steps taken in the run."""
        return self.plan.first_step + self.state.done

    # -- the story -----------------------------------------------------------------------------------------------------

    def train(self) -> StageSummary:
        """Take the steps that are left. Raises what `fit` says."""
        plan, accelerator = self.plan, self.run.accelerator
        self.run.progress.start_stage(plan, self.state.done)
        summary = self._after_step() if self.state.pending else None
        step = self._make_step()
        batches = self.run.parts.stage_data(plan.name).steps(
            start=self.state.done, stop=plan.steps, rank=accelerator.process_index, world_size=accelerator.num_processes
        )
        while summary is None:
            began = perf_counter()
            micro_batches = next(batches)
            learning_rates = set_learning_rates(
                self.optimizer, schedule_factor(self.run.trainer, plan, self.state.done)
            )
            place = f"stage {plan.name}, step {self.step_number + 1}"
            with memory_errors(place), compile_errors(place, self.run.trainer):
                self.unread.append(step(self.state.done, micro_batches, stop=self._stop_flags()))
                self.state.done += 1
                result = self._read_steps()
            self._log(result, learning_rates, perf_counter() - began)
            if result is not None and (result.interrupted or result.signalled):
                self._save_and_stop(result.interrupted)
            summary = self._after_step()
        return summary

    def _make_step(self) -> TrainingStep:
        run, first = self.run, self.state.done
        checks = GradientCheck(run.parts, self.plan, start=first)

        def before_update(step: int) -> None:
            self.state.recorded = training_step.recorded
            if step == first:
                check_sites_called(run.parts.sites, self.state.recorded)
            if checks.observe(step):
                checks.verdict(self.state.recorded)

        training_step = TrainingStep(
            run.parts,
            self.wrapped,
            run.accelerator,
            run.trainer,
            self.plan,
            self.optimizer,
            self.head,
            self.routing_stats,
            seed=run.seed,
            run_dir=run.run_dir,
            anchors=self.anchors,
            before_update=before_update,
            skipped=self.state.skipped,
        )
        return training_step

    def _read_steps(self) -> StepResult | None:
        """Take in the numbers of all steps but the latest, which the device may be at: or of that one too, if something
        follows that needs them. Returns the last that was read.

        Several ranks hear of a signal with the numbers, so they stop a step later where nothing else is due.
        """
        result, keep = None, 0 if self._numbers_are_due() else 1
        while len(self.unread) > keep:
            result = self.unread.pop(0).read()
            self._count(result)
            if result.interrupted or result.signalled:
                keep = 0
        return result

    def _count(self, result: StepResult) -> None:
        if result.skipped is None:
            self.state.window.add(result)
            self.state.tokens += result.tokens
            return
        self.state.skipped += 1
        facts = dict(result.skipped)
        step = facts.pop("step")
        self.run.metrics.write("skipped", step, self.plan.name, facts)
        self.run.progress.say(
            f"warning: stage {self.plan.name}, step {step} is left out ({self.state.skipped} of at most "
            f"{self.run.trainer.max_skipped_steps}): {', '.join(f'{k} is {v}' for k, v in facts['not_finite'].items())}"
        )

    def _numbers_are_due(self) -> bool:
        """Whether log, evaluation, checkpoint, end or a signal follows this step; the same answer on every rank."""
        trainer, done = self.run.trainer, self.state.done
        due = any(_due(done, every) for every in (trainer.log_every, trainer.eval_every, trainer.checkpoint_every))
        alone = self.run.accelerator.num_processes == 1
        return due or done == self.plan.steps or (alone and any(self._stop_flags()))

    def _after_step(self) -> StageSummary | None:
        """Evaluation and checkpoint, as far as they are due; the summary once the stage is complete."""
        trainer, state = self.run.trainer, self.state
        last = state.done == self.plan.steps
        gained = stop_early = False
        if any(self.run.parts.validation.values()) and (last or _due(state.done, trainer.eval_every)):
            result = self._evaluate()
            stop_early = self._out_of_patience(result)
            gained = improves(result.loss, state.best_loss, 0.0)
            if gained:
                state.best_step, state.best_loss = self.step_number, result.loss
        state.pending = False
        if last or stop_early:
            return self._finish(stopped_early=stop_early and not last)
        if gained or _due(state.done, trainer.checkpoint_every):
            self._save()
        return None

    def _finish(self, *, stopped_early: bool) -> StageSummary:
        self._flush_log({})
        state = self.state
        summary = StageSummary(
            name=self.plan.name,
            steps=state.done,
            planned_steps=self.plan.steps,
            seconds=round(state.seconds, 3),
            tokens=state.tokens,
            loss=state.last_losses["loss"],
            task_loss=state.last_losses["task_loss"],
            eval_loss=state.last_eval.loss if state.last_eval else None,
            eval_task_loss=state.last_eval.task_loss if state.last_eval else {},
            best_step=state.best_step,
            best_eval_loss=state.best_loss,
            stopped_early=stopped_early,
            warnings=self._warnings(),
        )
        for text in summary.warnings:
            self.run.progress.say(f"warning: stage {self.plan.name}: {text}")
        timing = {"seconds": summary.seconds, "tokens_per_second": summary.tokens_per_second}
        values = {key: value for key, value in summary.plain().items() if key not in ("name", "seconds")}
        self.run.metrics.write("stage", self.step_number, self.plan.name, {**values, "timing": timing})
        self._save(finished=summary)
        self.run.settle()  # the next stage, or what comes after training, builds on it
        return summary

    def _warnings(self) -> tuple[str, ...]:
        found = list(self.state.alarms)
        if self.state.skipped:
            found.append(f"{self.state.skipped} steps were left out, for they were not finite (see metrics.jsonl)")
        return (*found, *self._unmoved(), *self._risen())

    def _unmoved(self) -> tuple[str, ...]:
        if "experts" not in self.plan.train:
            return ()
        unmoved = unmoved_experts(self.run.parts.model, self.optimizer, self.run.parts.groups["experts"])
        if not unmoved:
            return ()
        listed = {site: f"{site}: {', '.join(map(str, experts))}" for site, experts in unmoved.items()}
        count = sum(map(len, unmoved.values()))
        return (f"{count} experts never moved: no gradient of the stage reached them ({some_of(listed)})",)

    def _risen(self) -> tuple[str, ...]:
        """A stage that changes who routes starts above where the one before it ended; it has to come down again."""
        before, after = self.run.history[-1:], self.state.last_eval
        if not before or before[0].eval_loss is None or after is None:
            return ()
        if after.loss - before[0].eval_loss <= self.run.trainer.watch.loss_rise:
            return ()
        return (
            f"the evaluation loss is {after.loss:.4f} after {self.state.done} steps, and was {before[0].eval_loss:.4f}"
            f" after stage {before[0].name}; give this stage more steps, or another learning rate",
        )

    # -- log -----------------------------------------------------------------------------------------------------------

    def _log(self, result: StepResult | None, learning_rates: dict[str, float], seconds: float) -> None:
        """Show the step that was read last; after the latest step of a window, that is the latest."""
        self.state.window.seconds += seconds
        self.state.seconds += seconds
        if result is None:
            return
        memory = memory_gib(self.run.accelerator.device)
        self.run.progress.step(self.plan, self.state.done, result.loss, result.tokens / max(seconds, 1e-9), memory)
        if _due(self.state.done, self.run.trainer.log_every) or self.state.done == self.plan.steps:
            norms = {} if result.skipped else {"grad_norm": dict(result.grad_norms)}
            self._flush_log({"lr": learning_rates, **norms})

    def _flush_log(self, latest: dict[str, Any]) -> None:
        """Write the lines of the window and start a new one; nothing if no step was taken since."""
        run, window = self.run, self.state.window
        if not window.steps:
            return
        routing = self.routing_stats.fetch()
        self.state.last_losses = window.losses(run.parts.task_names)
        values: dict[str, Any] = dict(self.state.last_losses)
        if window.aux:
            values["aux"] = {n: _aux_line(run.parts.aux[n], total / window.steps) for n, total in window.aux.items()}
        if self.plan.anchor > 0:
            mean = window.anchor / window.steps
            values["anchor"] = {"raw": mean, "weighted": self.plan.anchor * mean}
        tokens_per_second = window.tokens / max(window.seconds, 1e-9)
        memory = memory_gib(run.accelerator.device)
        timing = {"seconds": window.seconds, "tokens_per_second": tokens_per_second, "memory_gib": memory}
        run.metrics.write("train", self.step_number, self.plan.name, {**values, **latest, "timing": timing})
        if routing is not None:
            self._watch(routing)
            run.metrics.write("routing", self.step_number, self.plan.name, {**routing, "alarms": self.state.alarms})
        loss = self.state.last_losses["loss"]
        run.progress.logged(self.plan, self.state.done, loss, tokens_per_second, memory)
        self.state.window = Window(len(run.parts.task_names))

    def _watch(self, routing: dict[str, Any]) -> None:
        """Keep what the routers' loads give cause to warn about; say it once it has lasted."""
        state, watch = self.state, self.run.trainer.watch
        state.alarms = list(alarms(routing, watch)) if self.plan.routing == "learned" else []
        state.alarmed = state.alarmed + 1 if state.alarms else 0
        if state.alarmed == watch.patience:
            for text in state.alarms:
                self.run.progress.say(f"warning: stage {self.plan.name}: {text}")

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self) -> EvalResult:
        run = self.run
        stats = RoutingStats(run.parts.task_names, run.accelerator, dead_load=run.trainer.watch.dead_load)
        result = evaluate(
            run.parts,
            run.accelerator,
            run.trainer,
            self.head,
            routing_stats=stats,
            stop_requested=lambda: any(self._stop_flags_everywhere()),
        )
        if result is None:
            self._save_and_stop(self._stop_flags_everywhere()[0])
        bad = [task for task, loss in result.task_loss.items() if not isfinite(loss)]
        if bad:
            raise DivergedError(
                f"stage {self.plan.name}, step {self.step_number}: the evaluation loss of {', '.join(bad)} is not "
                f"finite; the last checkpoint is kept; lower trainer.lr"
            )
        self.state.last_eval = result
        run.metrics.write("eval", self.step_number, self.plan.name, result.plain())
        stats.know_all_sites()
        routing = stats.fetch()
        if routing is not None:
            run.metrics.write("eval_routing", self.step_number, self.plan.name, routing)
        run.progress.say(f"{self.plan.name} {self.state.done}/{self.plan.steps}  eval loss {result.loss:.4f}")
        return result

    def _out_of_patience(self, result: EvalResult) -> bool:
        settings, state = self.run.trainer.early_stopping, self.state
        if settings is None:
            return False
        if improves(result.loss, state.patience_loss, settings.min_delta):
            state.patience_loss, state.evals_without_gain = result.loss, 0
        else:
            state.evals_without_gain += 1
        return state.evals_without_gain >= settings.patience

    # -- stopping, saving, continuing ----------------------------------------------------------------------------------

    def _stop_flags(self) -> tuple[bool, bool]:
        """(interrupted, signalled) of this rank."""
        received = self.signals.received
        return received == SIGINT, received is not None and received != SIGINT

    def _stop_flags_everywhere(self) -> tuple[bool, bool]:
        """The same over all ranks, so that they agree; call it on every rank."""
        accelerator = self.run.accelerator
        flags = torch.tensor(self._stop_flags(), dtype=torch.float32, device=accelerator.device)
        if accelerator.num_processes > 1:
            flags = accelerator.reduce(flags, reduction="sum")
        interrupted, signalled = flags.tolist()
        return interrupted > 0, signalled > 0

    def _save_and_stop(self, interrupted: bool) -> NoReturn:
        self.state.pending = True
        path = self._save()
        self.run.settle()
        self.signals.chain()
        where = f"after step {self.step_number} (stage {self.plan.name}); saved {path}; resume=auto continues"
        if interrupted:
            raise Interrupted(f"stopped by Ctrl-C {where}")
        name = self.signals.received.name if self.signals.received else "a signal to another process"
        raise SavedOnSignal(f"stopped by {name} {where}")

    def _save(self, *, finished: StageSummary | None = None) -> Path:
        tensors = {"routing_window": self.routing_stats.state()}
        numbers: dict[str, Any] = {}
        if finished is None:  # else optimizer and anchors have no further use
            tensors["optimizer"], numbers = optimizer_tensors(self.optimizer, self.names)
            tensors["anchors"] = self.anchors
        return self.run.save(self.plan, self.state, tensors=tensors, optimizer_numbers=numbers, finished=finished)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint left this stage; the adapter is loaded already."""
        with readable_state(checkpoint), memory_errors("restoring a checkpoint"):
            self.state = StageState.from_plain(checkpoint.state["stage_state"])
            self.routing_stats.load_state(checkpoint.tensors("routing_window"))
            optimizer = checkpoint.tensors("optimizer")
            load_optimizer_tensors(self.optimizer, self.names, optimizer, checkpoint.state["optimizer"])
            stored = checkpoint.tensors("anchors")
            self.anchors = {name: stored[name].to(self.run.accelerator.device) for name in self.anchors}
            self.run.restore_generators(checkpoint)


def _aux_line(term: AuxTerm, mean: float) -> dict[str, float]:
    line = {"raw": mean, "weighted": term.weight * mean}
    return line if term.balanced is None else {**line, "balanced": term.balanced}


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
