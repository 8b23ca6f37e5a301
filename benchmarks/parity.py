"""Our scores of a model folder beside those of lm-eval's own command line, item by item.

    python -m benchmarks.parity --data-root DATA --model FOLDER [--quick] [--limit N] [--json FILE]

Both read the folder in float32 and score the first N rows of the local files: lm-eval in a process of its own, from its
stock definitions with the data set replaced, ours with `evaluate`. Counted are documents, log-likelihoods, generated
texts and metrics that were compared, and everything that is not equal: prompts, greedy flags, texts, metrics. The
log-likelihoods are sums over float32 logits of other batches, so their largest difference is reported; whatever depends
on them must be the same. HumanEval's stock file cannot be imported offline: its texts are compared and not run.
SystemExit with code 1 where anything is unequal.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm_eval_cli import Agreement, agreement, run_cli, shown, write_tasks
from benchmarks.measure import arguments, finish, table
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.schema.evaluation import EvalConfig

# those of LoRA-Mixer
SEVEN = "gsm8k,humaneval,medqa_4options,cola,sst2,arc_easy,arc_challenge"


OPTIONS: dict[str, dict[str, Any]] = {
    "data_root": {"required": True},
    "model": {"required": True},
    "tasks": {"default": SEVEN},
    "limit": {"type": int, "help": "rows of each benchmark"},
    "num_fewshot": {"type": int, "help": "examples; default: each benchmark's own number"},
    "new_tokens": {"type": int, "default": 128, "help": "longest generation"},
    "batch_size": {"type": int, "default": 16, "help": "of lm-eval's command line"},
}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("parity", __doc__, given, **OPTIONS)
    limit = options.limit or (4 if options.quick else 40)
    config = EvalConfig(
        limit=limit, num_fewshot=options.num_fewshot, max_new_tokens=options.new_tokens, allow_code_execution=True
    )
    model, names = Path(options.model).expanduser().resolve(), options.tasks.split(",")
    planned = check_benchmarks(names, config, options.data_root).planned
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(Path(folder), planned)
        theirs = run_cli(model, planned, tasks, limit=limit, batch_size=options.batch_size, device=options.device)
    found: dict[str, Agreement] = {}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loramoe_train.evaluation.harness import compare

    def note(_: Any, result: Any) -> None:
        found[result.name] = agreement(result.samples, theirs.samples[result.name])
        print(f"{result.name}: {found[result.name].plain()}", flush=True)

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    compare(
        *(loaded, tokenizer, names),
        config=config,
        data_root=options.data_root,
        seed=0,
        base_mode=None,
        on_result=note,
    )
    rows = {name: each.plain() for name, each in found.items()}
    table(f"{limit} rows of each, {options.device}, float32", {name: shown(row) for name, row in rows.items()})
    report = {"limit": limit, "num_fewshot": options.num_fewshot, "new_tokens": options.new_tokens, "agreement": rows}
    finish(report, options.json)
    unequal = sum(each.unequal for each in found.values())
    print(f"{sum(each.documents for each in found.values())} documents, {unequal} unequal items")
    if unequal:
        raise SystemExit(1)
    return report


if __name__ == "__main__":
    main()
