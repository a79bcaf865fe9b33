"""Pickles of arrays, text and numbers. A pickle may ask for any function; these may not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files


class _Refused(pickle.UnpicklingError):
    pass


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes. Other codecs would be looked up among modules."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


def _dtype(*arguments: Any) -> np.dtype:
    dtype = np.dtype(*arguments)
    if dtype.hasobject:
        raise _Refused("an array of objects")
    return dtype


def _admitted() -> dict[tuple[str, str], Any]:
    """What NumPy's pickles name, in its versions before and after 2.0."""
    sample = np.zeros(1, np.uint8)
    # NumPy's own names for these are private, and the old ones warn when they are imported.
    rebuild: Any = sample.__reduce__()[0]
    from_buffer: Any = sample.__reduce_ex__(5)[0]
    out: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        out[f"{core}.multiarray", "_reconstruct"] = rebuild
        out[f"{core}.numeric", "_frombuffer"] = from_buffer
    return out


class _Unpickler(pickle.Unpickler):
    ADMITTED = _admitted()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def _refuse_others(content: Any) -> None:
    """Opcodes make what no name is needed for: sets, or an array whose state is replaced."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if type(value) in (list, dict):
            if id(value) not in seen:  # a list may hold itself
                seen.add(id(value))
                left += [*value, *value.values()] if isinstance(value, dict) else value
        elif type(value) is np.ndarray:
            if value.dtype.hasobject:
                raise _Refused("an array of objects")
        elif type(value) not in (bytes, str, int):
            raise _Refused(f"a value of type {type(value).__name__}")


def load(path: Path, cure: str) -> Any:
    """The content of a pickle: ndarray (not of objects), bytes, str, int, and list and dict of
    them. No other types, and no types derived from these.

    `cure` is how to mend a bad one. Raises `UserError` for a pickle that is missing or damaged, or
    that holds or asks for anything else, which is then not run.
    """
    try:
        with open(path, "rb") as f:
            content = _Unpickler(f, encoding="latin1").load()
        _refuse_others(content)
        return content
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {cure}") from None
    except OSError as error:
        raise files.kind(error)(f"cannot read {path}: {error.strerror}") from None
    except _Refused as refused:
        raise UserError(
            f"{path}: refused, it asks for {refused}, and images need no more than arrays, text "
            f"and numbers: {cure}"
        ) from None
    except Exception as error:  # bytes that are no pickle fail in any way
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged ({said}): {cure}") from error
