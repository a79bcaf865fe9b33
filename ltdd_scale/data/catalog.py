"""The kinds of source, one line each: what `data.source` may be, and the module that knows it.

Such a module has `open_all(data) -> Source` (every image, before the long tail is drawn) and
`digest(data) -> str`, and where counting is quicker than opening `available(data) -> Available`.
"""

from __future__ import annotations

SOURCES = {
    "digits": "ltdd_scale.data.digits",
    "folder": "ltdd_scale.data.folders",
    "list": "ltdd_scale.data.lists",
    "shards": "ltdd_scale.data.shards",
}
