"""What a page is made of: sections of blocks. Templates make HTML of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Note:
    text: str
    kind: str = "note"


@dataclass(frozen=True)
class Table:
    """`rows`: the heading, then the rows; each row's first cell names it. `strong`: what the first
    cell of a row says that stands out. `closed`: folded away behind its caption."""

    caption: str
    rows: Sequence[Sequence[str]]
    strong: str = ""
    closed: bool = False
    kind: str = "table"

    @property
    def words(self) -> list[bool]:
        """Which columns have words, not numbers: they stand at the left."""
        columns = zip(*self.rows[1:], strict=True) if len(self.rows) > 1 else self.rows[:1]
        return [any(cell[:1].isalpha() for cell in column) for column in columns]


@dataclass(frozen=True)
class Drawing:
    """`svg` is whole and safe. `files`: where the picture lies, for who wants to keep it."""

    title: str
    svg: Markup
    caption: str
    files: Sequence[str] = ()
    kind: str = "drawing"


@dataclass(frozen=True)
class Sheet:
    """An image as a data URL, `width` pixels of the page wide."""

    title: str
    source: str
    width: int
    alt: str
    kind: str = "sheet"


@dataclass(frozen=True)
class Code:
    summary: str
    text: str
    kind: str = "code"


Block = Note | Table | Drawing | Sheet | Code


@dataclass(frozen=True)
class Section:
    name: str  # of its link
    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def environment() -> Environment:
    """Templates whose values are escaped; an unknown name in one is an error."""
    return Environment(
        loader=PackageLoader("ltdd_scale.publish"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
