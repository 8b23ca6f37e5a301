"""The list of benchmarks for users, made from their files: `python -m loramoe_train.evaluation.listing` prints it.

It is the table of docs/evaluation.md; a test holds the two together.
"""

from loramoe_train.evaluation.tasks import FOLDER, Benchmark, known_benchmarks, load_benchmark

HEADINGS = ("benchmark", "what it asks", "form", "shots", "headline", "lm-eval's file", "rows", "hub", "compared on")


def benchmark_table() -> str:
    """A Markdown table, one row per benchmark, sorted by name; no line break at its end."""
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    rows += [_row(load_benchmark(name)) for name in known_benchmarks()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(benchmark: Benchmark) -> tuple[str, ...]:
    copied = benchmark.stock or benchmark.mirrors
    hub = benchmark.hub
    return (
        f"`{benchmark.name}`",
        _first_sentence(benchmark.name),
        _form(benchmark),
        _shots(benchmark),
        benchmark.headline.removesuffix(",none"),
        f"`{copied}`" if copied else "none",
        f"`{benchmark.files[benchmark.split]}`",
        "in the package" if hub is None else " ".join(part for part in (hub.name, hub.config) if part),
        benchmark.checked_on if copied else "",
    )


def _first_sentence(name: str) -> str:
    """Of the comment that a definition begins with."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])
    return comment.split(". ")[0].removesuffix(".").replace("|", "\\|")


def _form(benchmark: Benchmark) -> str:
    if benchmark.executes_code:
        return "writes code, which is run"
    return "writes an answer" if benchmark.generates else "likelihood of given answers"


def _shots(benchmark: Benchmark) -> str:
    own = str(benchmark.num_fewshot(None))
    if not benchmark.takes_examples:
        return f"{own}, fixed"
    return own if benchmark.examples is None else f"{own}, at most {len(benchmark.examples)}"


if __name__ == "__main__":
    print(benchmark_table())
