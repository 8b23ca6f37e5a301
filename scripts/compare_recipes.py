"""Every recipe on the embedded default, over several seeds, as one table of docs/results.md:

    python scripts/compare_recipes.py RUNS --seeds 3 --write docs/results.md

Trains what is not there yet, one run a folder, `RUNS/RECIPE/SEED`; a command that was stopped goes on where it was.
Recipes over downloaded adapters get one LoRA per task, trained first with the recipe `lora` (`RUNS/adapters/TASK`).
Further KEY=VALUE arguments go to every run. Base scores come from the first run of `lora`.

Memory is the largest resident set, Python and its libraries included, related to `lora` with the same seed. Speed is
measured afterwards, for runs that are each other's neighbours (--jobs) tell nothing about it: `--rounds` short runs of
every recipe, one at a time, all recipes once before any of them a second time (`RUNS/speed/RECIPE/ROUND`). Tokens per
second without the first step of each stage, related to `lora` in the same round; the median over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"
SHORT = ("trainer.max_steps=12", "trainer.log_every=1", "data.validation_examples=0", "eval.enabled=false")
REFERENCE = "lora"  # what speed and memory are related to, and what adapters are made with


def command(name: str, *arguments: str) -> None:
    """`loramoe-NAME ARGUMENTS`, with its output kept back unless it fails."""
    code = f"import sys; sys.argv[0] = 'loramoe-{name}'; from loramoe_train import cli; cli.{name}()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(
            f"loramoe-{name} {' '.join(arguments)}\nfailed with code {done.returncode}: {done.stderr[-2000:]}"
        )


def train(recipe: str, run: Path, *arguments: str) -> None:
    if not (run / "results.json").is_file():
        command("train", f"+recipe={recipe}", f"run_dir={run}", "resume=auto", *arguments)
        print(f"trained {run}", flush=True)


def make_adapter(task: str, folder: Path, *arguments: str) -> Path:
    """A PEFT folder with plain LoRA that knows one task."""
    made = folder / task / "peft"
    if not made.is_dir():
        alone = [f"data.tasks=[{task}]", "trainer.max_steps=60", "eval.enabled=false"]
        train(REFERENCE, folder / task / "run", *arguments, *alone)
        command("export", str(folder / task / "run"), str(made))
    return made


def speed(run: Path) -> float:
    """Tokens per second of a short run, without the start of each stage."""
    lines: dict[str, list[dict[str, float]]] = {}
    for entry in log(run):
        if entry["kind"] == "train":
            lines.setdefault(entry["stage"], []).append(entry["timing"])
    taken = [timing for timings in lines.values() for timing in timings[1:]]
    return sum(t["tokens_per_second"] * t["seconds"] for t in taken) / sum(t["seconds"] for t in taken)


def wants_adapters(recipe: Path) -> bool:
    """Whether a recipe trains routers alone in all of its stages: then its experts come from elsewhere."""
    stages = (yaml.safe_load(recipe.read_text(encoding="utf-8")).get("trainer") or {}).get("stages") or {}
    return bool(stages) and all(stage.get("train") == ["routers"] for stage in stages.values())


# -- reading runs ------------------------------------------------------------------------------------------------------


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read(run: Path) -> dict[str, Any]:
    """Scores by benchmark (per cent), and largest resident set in MiB of one finished run."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return {
        "tuned": {name: 100 * score["tuned"] for name, score in results["scores"].items()},
        "base": {name: 100 * score["base"] for name, score in results["scores"].items() if score["base"] is not None},
        "mib": max(entry["timing"]["memory_gib"] for entry in log(run) if entry["kind"] == "train") * 1024,
    }


def parameters(run: Path) -> tuple[int, int]:
    """(trained, active per token) of a run, counted from its config."""
    from loramoe_train.planning import make_counts
    from loramoe_train.validation import validate

    values = yaml.safe_load((run / "config.resolved.yaml").read_text(encoding="utf-8"))
    counts = make_counts(validate(values))[0]
    return counts.trained, counts.active


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def table(runs: Path, recipes: Iterable[str], seeds: Sequence[int], rounds: int) -> str:
    """The Markdown table of what was measured."""
    reference = {seed: read(runs / REFERENCE / str(seed)) for seed in seeds}
    names = list(reference[seeds[0]]["tuned"])
    heads = ["recipe", *names, "mean", "trained", "active", "tokens/s", "memory"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    base = reference[seeds[0]]["base"]
    if base:
        shown = [f"{base[name]:.1f}" for name in names]
        lines.append("| " + " | ".join(["(base)", *shown, f"{statistics.mean(base.values()):.1f}", *[""] * 4]) + " |")
    for recipe in recipes:
        found = {seed: read(runs / recipe / str(seed)) for seed in seeds}
        scores = [spread([found[seed]["tuned"][name] for seed in seeds]) for name in names]
        means = spread([statistics.mean(found[seed]["tuned"].values()) for seed in seeds])
        memory = statistics.median(found[seed]["mib"] / reference[seed]["mib"] for seed in seeds)
        fast = [speed(places[recipe]) / speed(places[REFERENCE]) for places in speed_runs(runs, recipes, rounds)]
        ratios = [f"{statistics.median(fast):.2f}" if fast else "", f"{memory:.2f}"]
        counts = [f"{number:,}" for number in parameters(runs / recipe / str(seeds[0]))]
        lines.append("| " + " | ".join([f"`{recipe}`", *scores, means, *counts, *ratios]) + " |")
    short = [run for places in speed_runs(runs, recipes, rounds) for run in places.values()]
    made = _commits([runs / recipe / str(seed) for recipe in recipes for seed in seeds])
    timed = f", speed {_commits(short)}" if short else ""
    return "\n".join([*lines, "", f"Commit {made}{timed}; seeds {', '.join(map(str, seeds))}."])


def _commits(runs: Iterable[Path]) -> str:
    found = {json.loads((run / "results.json").read_text(encoding="utf-8"))["commit"] for run in runs}
    return ", ".join(sorted(str(commit)[:12] for commit in found))


def speed_runs(runs: Path, recipes: Iterable[str], rounds: int) -> list[dict[str, Path]]:
    """By round: recipe -> folder of its short run."""
    names = dict.fromkeys([REFERENCE, *recipes])
    return [{name: runs / "speed" / name / str(number) for name in names} for number in range(rounds)]


def write(document: Path, text: str) -> None:
    """Put the table between the document's marks."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{document} has no {BEGIN} ... {END}")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--rounds", type=int, default=2, help="short runs of each recipe for its speed")
    parser.add_argument("--recipes", help="comma list; default: all")
    parser.add_argument("--write", type=Path, help="a document with the marks for the table")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run")
    options = parser.parse_intermixed_args()
    files = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    recipes = options.recipes.split(",") if options.recipes else list(files)
    runs, seeds = options.runs.resolve(), range(options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        adapters: list[Path] = []
        if any(wants_adapters(files[recipe]) for recipe in recipes):
            tasks = yaml.safe_load((ROOT / "configs/data/tiny.yaml").read_text(encoding="utf-8"))["tasks"]
            made = [pool.submit(make_adapter, task, runs / "adapters", *options.overrides) for task in tasks]
            adapters = [done.result() for done in made]

        def given(recipe: str, seed: int) -> list[str]:
            brought = [f"experts.adapters=[{','.join(map(str, adapters))}]"] if wants_adapters(files[recipe]) else []
            return [*options.overrides, f"seed={seed}", *brought]

        waiting = []
        for seed in seeds:
            for recipe in dict.fromkeys([REFERENCE, *recipes]):
                arguments = given(recipe, seed)
                if (recipe, seed) != (REFERENCE, 0):
                    arguments.append("eval.base=false")
                waiting.append(pool.submit(train, recipe, runs / recipe / str(seed), *arguments))
        try:
            for done in waiting:
                done.result()
        except BaseException:  # what has not begun is left for the next time
            pool.shutdown(cancel_futures=True)
            raise
    for number, places in enumerate(speed_runs(runs, recipes, options.rounds)):
        for recipe, run in places.items():
            train(recipe, run, *given(recipe, number), *SHORT)
    text = table(runs, recipes, seeds, options.rounds)
    print(text)
    if options.write:
        write(options.write, text)


if __name__ == "__main__":
    main()
