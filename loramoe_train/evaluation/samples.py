"""One tidy record per document out of lm-eval's one per document and filter."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def tidy_samples(raw: Iterable[Mapping[str, Any]], repeats: int = 1) -> list[dict[str, Any]]:
    """Records by document, in order. `repeats`: responses asked for per request.

    Each holds `doc_id`, `doc`, `prompt` (text, or one per choice where the choices are in the prompt), `target`, what
    the model answered (`continuations` with `log_likelihoods` and `greedy`, or `responses`), `filtered` by filter,
    `metrics` by "metric,filter", and lm-eval's `prompt_hash`.
    """
    records: dict[int, dict[str, Any]] = {}
    for entry in raw:
        record = records.setdefault(entry["doc_id"], _first(entry, repeats))
        record["filtered"][entry["filter"]] = _plain(entry["filtered_resps"])
        for metric in entry["metrics"]:
            record["metrics"][f"{metric},{entry['filter']}"] = _plain(entry[metric])
    return [records[doc_id] for doc_id in sorted(records)]


def _first(entry: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    arguments = [list(argument) for argument in entry["arguments"]]
    prompts = list(dict.fromkeys(argument[0] for argument in arguments))
    record = {
        "doc_id": entry["doc_id"],
        "doc": _plain(entry["doc"]),
        "prompt": prompts[0] if len(prompts) == 1 else prompts,
        "target": _plain(entry["target"]),
    }
    responses = [answer[0] for answer in entry["resps"]]
    if isinstance(responses[0], tuple | list):  # (log-likelihood, is it what greedy decoding would write)
        record |= {
            "continuations": [argument[1] for argument in arguments],
            "log_likelihoods": [float(response[0]) for response in responses],
            "greedy": [bool(response[1]) for response in responses],
        }
    else:
        # with several processes lm-eval evens their shares out by asking the last request of a share again
        record["responses"] = _plain(entry["resps"][0][:repeats])
    return {**record, "filtered": {}, "metrics": {}, "prompt_hash": entry["prompt_hash"]}


def _plain(value: Any) -> Any:
    """Numpy scalars and tuples as JSON knows them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
