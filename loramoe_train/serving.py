"""Whose examples a benchmark asks about, for routing that depends on an example's task or domain. Torch-free."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loramoe_train.errors import ConfigError, DataError, nearest
from loramoe_train.evaluation.tasks import base_name, known_benchmarks
from loramoe_train.schema.run import RunConfig

Served = dict[str, int | None]  # "task" and "domain" -> its index in the mixture; None: not known


def origins_asked(config: RunConfig) -> set[str]:
    """What evaluation has to know of an example: `task`, `domain`, both or nothing."""
    last = list(config.trainer.stages.values())[-1]
    return set(origins_in(config.router.make or {})) | ({"domain"} if last.routing == "by_domain" else set())


def origins_in(part: Mapping[str, Any]) -> Iterator[str]:
    """What the decisions of a part, or of those nested in it, depend on instead of the input."""
    for name, value in part.items():
        if name == "origin":
            yield str(value)
        elif isinstance(value, Mapping):
            yield from origins_in(value)


def served_by(
    config: RunConfig, benchmarks: Sequence[str], *, tasks: Sequence[str], domains: Sequence[str]
) -> dict[str, Served]:
    """Benchmark -> the task whose experts answer it, and that task's domain.

    It is that of `eval.serve_as`, else the one whose `lm_eval` names the benchmark.

    Args:
        tasks, domains: names of the mixture that the model was, or will be, trained on.

    Raises:
        ConfigError: the routing depends on something that is not known for a benchmark, or `eval.serve_as` names what
            does not exist.
        DataError: tasks and domains, which a stored adapter's manifest lists, are not those of its config.
    """
    for task in tasks:
        definition = config.data.definitions.get(task)
        if definition is None or (definition.domain or task) not in domains:
            what = "a task" if definition is None else f"the domain {definition.domain or task} of the task"
            raise DataError(
                f"tasks and domains of the mixture do not fit its config: {what} {task} is in one of them only"
            )
    for benchmark, task in config.eval.serve_as.items():
        if base_name(benchmark) not in known_benchmarks():
            raise ConfigError(f"eval.serve_as: '{benchmark}' is no benchmark{nearest(benchmark, known_benchmarks())}")
        if task not in tasks:
            raise ConfigError(f"eval.serve_as.{benchmark}={task}: no such task{nearest(task, tasks)}")
    found, asked = {}, origins_asked(config)
    for name in benchmarks:
        plain = base_name(name)  # however many examples are shown
        owners = [task for task in tasks if base_name(config.data.definitions[task].lm_eval or "") == plain]
        owners = [config.eval.serve_as[key] for key in (name, plain) if key in config.eval.serve_as][:1] or owners
        theirs = {config.data.definitions[task].domain or task for task in owners}
        found[name] = {"task": _only([tasks.index(task) for task in owners])}
        found[name]["domain"] = _only([domains.index(domain) for domain in theirs])
        for origin in sorted(asked):
            if found[name][origin] is None:
                whose = f"{' and '.join(owners)} name it" if owners else "no task of data.tasks names it as lm_eval"
                raise ConfigError(
                    f"{name}: routing depends on the {origin} here, and {whose}; give eval.serve_as.{name}=TASK, or"
                    " leave it out of eval.tasks"
                )
    return found


def check_same_origins(
    config: RunConfig, manifest: Mapping[str, Any], key: str, *, tasks: Sequence[str], domains: Sequence[str]
) -> None:
    """ConfigError where routing depends on tasks or domains, and a stored adapter's are others or in another order: its
    weights would serve the wrong ones without a word."""
    ours = {"task": list(tasks), "domain": list(domains)}
    for origin in sorted(origins_asked(config)):
        theirs = list(manifest[f"{origin}s"])
        if theirs != ours[origin]:
            raise ConfigError(
                f"{key} was trained on the {origin}s {', '.join(theirs)}, this run has {', '.join(ours[origin])};"
                f" routing depends on the {origin}, so give the same ones in the same order"
            )


def _only(indices: Sequence[int]) -> int | None:
    return indices[0] if len(indices) == 1 else None
