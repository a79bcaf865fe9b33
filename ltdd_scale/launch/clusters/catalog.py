"""The clusters, a line each."""

from __future__ import annotations

from pathlib import Path

from ltdd_scale.errors import UserError
from ltdd_scale.launch.cluster import Cluster
from ltdd_scale.stage import function

CLUSTERS = {
    "slurm": "ltdd_scale.launch.clusters.slurm:Slurm",
    "local": "ltdd_scale.launch.clusters.local:Local",
}


def open_cluster(name: str, folder: Path, nproc: int | None = None, quiet: bool = False) -> Cluster:
    """The cluster of this name for the campaign in `folder`."""
    if name not in CLUSTERS:
        raise UserError(f"--cluster {name}: there is no such cluster, only {', '.join(CLUSTERS)}")
    return function(CLUSTERS[name])(folder, nproc, quiet)
