"""Points, plans and campaigns of the tiny run: what the tests of jobs share."""

from functools import cache
from pathlib import Path

import yaml
from conftest import TINY

from ltdd_scale import recipe
from ltdd_scale.config import load as configuration
from ltdd_scale.config.root import Config
from ltdd_scale.launch import campaign, jobs, profile
from ltdd_scale.stage import Stage

# Jobs of the uni-level method, in their order.
RLDD = [
    "shard",
    "observer",
    "teacher",
    "calibrate",
    "initialize",
    "recover",
    "relabel",
    "students",
    "embedding",
    "evaluate",
    "report",
]


def load(tmp_path: Path, name: str = "p.yaml", **values) -> profile.Profile:
    (tmp_path / name).write_text(yaml.safe_dump(values))
    return profile.load(tmp_path / name)


@cache
def record(job: str) -> Stage | None:
    """A stage that the job makes."""
    return next((s for s in recipe.stages(Config(), "") if s.job == job), None)


def of(found: profile.Profile, job: str) -> profile.Resources:
    return found.of(job, record(job))


def point(tmp_path: Path, name: str, *sets: str) -> jobs.Point:
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = configuration.load(tmp_path / "tiny.yaml", sets)
    return jobs.Point(name, config, tmp_path / name, "digits")


def made_of(tmp_path: Path, *points: jobs.Point, wants=None) -> campaign.Campaign:
    shell = campaign.Campaign(
        "tiny", tmp_path / "jobs", tmp_path / "store", "slurm", points=list(points)
    )
    return campaign.make(shell, wants or profile.Profile())


def campaign_of(run: Path, config: Path, *sets: str, cluster: str = "slurm") -> campaign.Campaign:
    """The jobs of a run that is there."""
    from ltdd_scale.launch import perform

    found = perform.resolve(configuration.load(config, sets), run)
    one = jobs.Point("", found.config, run, found.source, found.asked)
    shell = campaign.Campaign("tiny", run / "jobs", run.parent / "store", cluster, [one])
    return campaign.make(shell, profile.Profile())


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
