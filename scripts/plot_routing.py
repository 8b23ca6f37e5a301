"""Draw which expert the routers choose, per layer and task: `python scripts/plot_routing.py RUN OUT.png`.

Reads the last routing record of RUN/metrics.jsonl (weights averaged over a layer's sites and the logged window), and
prints each expert's share of the weight, in per cent: of each task, and of all tasks alike.
"""

import json
import sys
from pathlib import Path
from typing import Any


def last_record(run: Path) -> dict[str, Any]:
    """The newest routing record of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "routing"]
    if not records:
        sys.exit(f"{run}/metrics.jsonl holds no routing record")
    return records[-1]


def shares(record: dict[str, Any]) -> dict[str, list[float]]:
    """Per cent of the weight that each expert gets: of every task, and `all`, the mean over tasks.

    Means over layers, of those with the largest number of experts where layers differ.
    """
    layers = list(record["layers"].values())
    most = max(len(weights) for tasks in layers for weights in tasks.values())
    found = {}
    for task in layers[0]:
        rows = [tasks[task] for tasks in layers if task in tasks and len(tasks[task]) == most and sum(tasks[task]) > 0]
        if rows:
            found[task] = [100 * sum(row[e] / sum(row) for row in rows) / len(rows) for e in range(most)]
    found["all"] = [sum(row[e] for row in found.values()) / len(found) for e in range(most)] if found else []
    return found


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
    record = last_record(Path(sys.argv[1]))
    for task, weights in shares(record).items():
        print(f"{task:<16}{''.join(f'{weight:8.1f}' for weight in weights)}")
    draw(record, Path(sys.argv[2]))
