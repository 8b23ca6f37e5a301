"""The process that runs the foreign code, and answers its judge's questions about what that code defined."""

import builtins
import json
import operator
import os
from collections.abc import Callable
from typing import Any

from loramoe_train.evaluation.sandbox.inside.values import MUTABLE, dumps, loads

# what the judge may ask of an object; `==` and `in` are not among them: the answer would be the foreign code's
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "attribute": getattr,
    "set": setattr,
    "item": operator.getitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
}


def serve(questions: int, answers: int) -> None:
    """Answer one question a line until there are no more. Both ends belong to the judge and nobody else.

    A question is `[operation, target, arguments, named arguments]`. An answer is `["value", result, changed]`, where
    `changed` gives the new content of arguments that were altered in place, or `["error", type, message]`.
    """
    names: dict[str, Any] = {"__name__": "candidate", "__builtins__": builtins}
    held: list[Any] = []

    def hold(thing: Any) -> int:
        for number, known in enumerate(held):
            if known is thing:
                return number
        held.append(thing)
        return len(held) - 1

    def answer(line: bytes) -> str:
        operation, target, arguments, named = loads(line, held.__getitem__, __import__)
        if operation == "run":
            exec(compile(target, "<candidate>", "exec"), names)
            result = None
        elif operation == "name":
            result = names[target]
        else:
            before = [dumps(value, hold) if isinstance(value, MUTABLE) else None for value in arguments]
            result = OPERATIONS[operation](target, *arguments, **named)
            changed = {
                str(index): value
                for index, value in enumerate(arguments)
                if before[index] is not None and dumps(value, hold) != before[index]
            }
            return dumps(["value", result, changed], hold)
        return dumps(["value", result, {}], hold)

    with os.fdopen(questions, "rb") as lines:
        for line in lines:
            try:
                text = answer(line)
            except BaseException as failure:  # SystemExit too: leaving early is not an answer
                text = json.dumps(["list", "error", type(failure).__name__, str(failure)])
            data = text.encode() + b"\n"
            while data:
                data = data[os.write(answers, data) :]
