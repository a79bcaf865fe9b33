"""The base of all settings: documented fields, limits, and one plain line for a wrong value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ltdd_scale.errors import UserError


class Settings(BaseModel):
    """Frozen; an unknown field is an error. A room's settings are such a class of its own."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, protected_namespaces=()
    )


def option(default: Any, doc: str, low: float | None = None, high: float | None = None) -> Any:
    """A field with its default, its documentation and its limits (inclusive)."""
    return Field(default=default, description=doc, ge=low, le=high)


def _switch(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    raise ValueError(f"expected bool, got {value!r}")


def _whole(value: Any) -> Any:
    whole = isinstance(value, int | float) and math.isfinite(value)
    if isinstance(value, bool) or not whole:
        raise ValueError(f"expected int, got {value!r}")
    return value


def _number(value: Any) -> Any:
    if isinstance(
        value, bool
    ):  # PyYAML reads 1e-3 as a string, and pydantic reads that as a number
        raise ValueError(f"expected float, got {value!r}")
    return value


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(
            f"expected str, got {value!r} (quote it: YAML reads on/off/yes/no as booleans)"
        )
    return "" if value is None else value


def _areas(value: list[float]) -> list[float]:
    if value and not (len(value) == 2 and 0 < value[0] <= value[1] <= 1):
        raise ValueError(f"expected two areas 0 < low <= high <= 1, got {value!r}")
    return value


Switch = Annotated[bool, BeforeValidator(_switch)]
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, BeforeValidator(_text)]
Areas = Annotated[list[Number], AfterValidator(_areas)]  # of RandomResizedCrop; empty: none

S = TypeVar("S", bound=Settings)


def parse(kind: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """`values` as settings of `kind`. Raises `UserError` with one line that names the key.

    `prefix` stands before each key of a message, such as ``stages.recover.``.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(kind, error.errors()[0], prefix)) from None


def _explain(kind: type[Settings], error: Any, prefix: str) -> str:
    """pydantic's error in the words of this house."""
    where = [p for p in error["loc"] if not (isinstance(p, str) and "[" in p)]
    key = prefix + ".".join(str(p) for p in where if isinstance(p, str))
    key += "".join(f"[{p}]" for p in where if isinstance(p, int))
    got, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            holder = _holder(kind, where[:-1])
            known = ", ".join(sorted(holder.model_fields)) if holder else "see 'ltdd-scale config'"
            return f"unknown config key '{key}' (known here: {known})"
        case "greater_than_equal":
            return f"{key}: must be at least {context['ge']:g}, got {got!r}"
        case "less_than_equal":
            return f"{key}: must be at most {context['le']:g}, got {got!r}"
        case "literal_error":
            choices = context["expected"].replace("'", "").replace(" or ", ", ")
            return f"{key}: {got!r} is none of {choices}"
        case "value_error":
            said = str(context["error"])
            return said if not key or said.startswith(key) else f"{key}: {said}"
        case "list_type":
            return f"{key}: expected a list, got {got!r}"
        case "dict_type":
            return f"{key}: expected settings, got {got!r}"
        case "model_type" | "model_attributes_type":
            return f"{key or 'the config'}: expected settings, got {got!r}"
    names = (("float", "float"), ("int", "int"), ("string", "str"), ("bool", "bool"))
    shown = next((n for start, n in names if error["type"].startswith(start)), error["msg"])
    return f"{key}: expected {shown}, got {got!r}"


def _holder(kind: type[Settings], where: list[Any]) -> type[Settings] | None:
    """The settings class at `where` inside `kind`."""
    for name in where:
        field = kind.model_fields.get(name)
        inner = _section(field.annotation) if field else None
        if inner is None:
            return None
        kind = inner
    return kind


def _section(annotation: Any) -> type[Settings] | None:
    """The settings class that a field holds, or None where it holds a value."""
    is_class = isinstance(annotation, type) and issubclass(annotation, Settings)
    return annotation if is_class else None


def lay_over(below: dict[str, Any], above: Any, kind: type[Settings], prefix: str = "") -> dict:
    """`above` laid over `below`, section by section. Raises `UserError` for an unknown key."""
    if not isinstance(above, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'the config'}: expected settings, got {above!r}")
    out = dict(below)
    for name, value in above.items():
        field = kind.model_fields.get(name)
        if field is None:
            known = ", ".join(sorted(kind.model_fields))
            raise UserError(f"unknown config key '{prefix}{name}' (known here: {known})")
        inner = _section(field.annotation)
        if inner is not None:
            value = lay_over(out[name], value, inner, f"{prefix}{name}.")
        out[name] = value
    return out


def shown_type(annotation: Any) -> str:
    """A field's type as people read it: ``int``, ``list[float]``, ``adamw | sgd``."""
    if get_origin(annotation) is Annotated:
        return shown_type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (list, dict):
        inner = ", ".join(shown_type(a) for a in get_args(annotation))
        return f"{get_origin(annotation).__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))
