"""The state of this package's source, as a hash: a job runs the code that it was submitted with."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def code_digest(package: Path = PACKAGE) -> str:
    """Hash of the package's source, templates and styles too."""
    digest = hashlib.sha256()
    found = (p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    for path in sorted(found):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
