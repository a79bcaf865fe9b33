"""Every setting, its type, its default and its meaning, as ``ltdd-scale config`` prints it."""

from __future__ import annotations

from ltdd_scale.config.root import Config
from ltdd_scale.judging.catalog import PROTOCOLS
from ltdd_scale.methods.catalog import METHODS
from ltdd_scale.settings import Settings, shown_type


def reference() -> str:
    lines: list[str] = []
    owners = {name: f"method {m.name}" for m in METHODS.values() for name in m.sections}
    owners |= {name: f"protocol {p.name}" for p in PROTOCOLS.values() for name in p.sections}

    def walk(target: Settings, prefix: str) -> None:
        nested = []
        for name, field in type(target).model_fields.items():
            value = getattr(target, name)
            if isinstance(value, Settings):
                nested.append((value, f"{prefix}{name}."))
                continue
            kind = shown_type(field.rebuild_annotation())
            lines.append(f"{prefix}{name} = {value!r} ({kind})\n      {field.description}")
        for value, inner in nested:
            about = (type(value).__doc__ or "").splitlines()[0]
            name = inner.rstrip(".")
            of = f" ({owners[name]})" if name in owners else ""
            lines.append(f"\n# {name}{of}: {about}")
            walk(value, inner)

    walk(Config(), "")
    return "\n".join(lines)
