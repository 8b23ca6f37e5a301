"""The strict base of every config class: unknown keys, wrong types and missing values are errors."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """No unknown key, no infinite number, no silent conversion of text to numbers; frozen once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)


Part = dict[str, object]
"""A part of the program: `_target_` names a class of this package, the other keys are its arguments."""
