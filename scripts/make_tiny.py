"""Makes the embedded default again: the rows of five small task families, a tokenizer and a pretrained tiny base model.

    python scripts/make_tiny.py                 # everything; the model takes about 20 minutes on two shared CPU cores
    python scripts/make_tiny.py --data-only     # the rows alone, a second
    python scripts/make_tiny.py --check         # makes nothing; measures what LoRA adds to the base there

The rows are the same everywhere. The weights are the same for one seed, thread count, machine type and torch build.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from tiny import corpus

ASSETS = Path(__file__).resolve().parents[1] / "loramoe_train" / "assets" / "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets data/ and model/")
    parser.add_argument("--steps", type=int, default=None, help="pretraining steps; fewer for a trial")
    parser.add_argument("--data-only", action="store_true", help="leave tokenizer and model as they are")
    parser.add_argument(
        "--check", action="store_true", help="tune the base in --out with plain LoRA, twice, and print the scores"
    )
    options = parser.parse_args()
    if options.check:
        from tiny import check

        check.check(options.out)
        return

    # waiting threads that spin starve each other when the cores are shared; read once, when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    corpus.write_rows(options.out / "data")
    if not options.data_only:
        # imported late: the rows need neither torch nor transformers
        from tiny import pretrain, tokenizer

        made = tokenizer.train_tokenizer()
        tokenizer.save(made, options.out / "model")
        plan = pretrain.Plan() if options.steps is None else pretrain.Plan(steps=options.steps)
        started = time.time()
        pretrain.save(pretrain.pretrain(made, plan), options.out / "model")
        print(f"pretrained in {time.time() - started:.0f} s")
    for path in sorted(options.out.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>9,} bytes  {path.relative_to(options.out)}")


if __name__ == "__main__":
    main()
