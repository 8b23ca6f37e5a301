"""Draw which expert the routers choose, per layer and task: `python scripts/plot_routing.py RUN OUT.png`.

Reads the last routing record of RUN/metrics.jsonl: of the held-out examples, or, where a run has none, of the last
logged training steps. Prints each expert's share of the weight, in per cent: of each task, and of all tasks alike.
"""

import sys
from pathlib import Path
from typing import Any

from loramoe_train.errors import DataError
from loramoe_train.reproduce.loads import HELD_OUT, TRAINING, last_record, mean_share, shares


def draw(record: dict[str, Any], out: Path) -> None:
    """One heat map per layer: tasks down, experts across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = record["layers"]
    figure, axes = pyplot.subplots(1, len(layers), figsize=(2.6 * len(layers) + 1.2, 2.6), squeeze=False, sharey=True)
    for axis, (layer, tasks) in zip(axes[0], layers.items(), strict=True):
        image = axis.imshow(list(tasks.values()), vmin=0, cmap="viridis", aspect="auto")
        axis.set_title(f"layer {layer.rpartition('.')[2]}", fontsize=9)
        axis.set_xlabel("expert", fontsize=8)
        axis.set_xticks(range(len(next(iter(tasks.values())))))
        axis.set_yticks(range(len(tasks)), list(tasks), fontsize=8)
    figure.colorbar(image, ax=list(axes[0]), label="weight")
    figure.savefig(out, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        record = last_record(Path(sys.argv[1]), (HELD_OUT, TRAINING))
    except DataError as error:
        sys.exit(str(error))
    found = shares(record)
    print("held-out examples" if record["kind"] == HELD_OUT else "the last training steps in the log")
    for task, weights in {**found, "all": mean_share(found)}.items():
        print(f"{task:<16}{''.join(f'{weight:8.1f}' for weight in weights)}")
    draw(record, Path(sys.argv[2]))
