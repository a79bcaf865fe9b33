"""From a config to a request, from a request to an exit code."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale import recipe, session
from ltdd_scale.config import load
from ltdd_scale.config.root import check
from ltdd_scale.data import backend, digest, shards, sources
from ltdd_scale.data.settings import Location
from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import OBSERVER, OWN, TORCHVISION, is_brought, options_of
from ltdd_scale.experts.stage import ROLES
from ltdd_scale.judging.catalog import PROTOCOLS
from ltdd_scale.launch.guard import guarded
from ltdd_scale.pipeline import graph
from ltdd_scale.request import Request
from ltdd_scale.runtime import files, place
from ltdd_scale.session import Session
from ltdd_scale.stage import Facts, Section, function, look_up

SHARE = 0.1  # of a run's FLOPs that the plain network may cost


@dataclass(frozen=True)
class Resolved:
    """A config with nothing left to resolve, and the digest of its images."""

    config: Any
    source: str
    asked: str  # hash of the config as it was asked for
    absent: bool = False  # the images are not here: `source` is a stand-in, nothing can run


def _absolute(config: Any) -> dict[str, str]:
    """The files that the config names, by absolute paths: jobs and 'status' may read them from
    elsewhere."""
    paths = look_up(config, Section("data", Location)).model_dump()
    out = {f"data.{n}": str(Path(p).expanduser()) for n, p in paths.items() if p.startswith("~")}
    if config.train.engine == "deepspeed":
        out["train.deepspeed"] = str(options_of(config.train.deepspeed).absolute())
    for role in ROLES:
        weights = getattr(config, role).weights
        if weights not in ("", OBSERVER, OWN) and not weights.startswith(TORCHVISION):
            out[f"{role}.weights"] = str(Path(weights).absolute())
    return out


def resolve(
    config: Any,
    out: Path,
    quiet: bool = True,
    read: dict[str, str] | None = None,
    dry_run: bool = False,
) -> Resolved:
    """Decide what the config leaves open, once: the decoder, and the plain network's place.

    What the run folder `out` has on record stays as it is, so that a run goes on as it began.
    `read` keeps digests of sources, for a sweep whose points have one. With `dry_run` a stand-in
    for the digest is enough where the config says what the set holds (``data.expected_…``): what
    is resolved so must not run. Raises `UserError` where the images are not there, nothing is on
    record of them and nothing stands in.
    """
    if not quiet:
        for warning in check(config):
            print(f"warning: {warning}", file=sys.stderr)
    record = out / session.RECORD
    known = files.read_json(record) if record.exists() else {}
    asked = hashlib.sha256(load.to_yaml(config).encode()).hexdigest()[:16]
    same = known.get("asked") == asked
    config = load.changed(config, _absolute(config))
    choices = dict(known.get("resolved", {}))
    if config.data.loader == "auto":
        choices.setdefault("data.loader", backend.resolve_loader(config.data))
        config = load.changed(config, {"data.loader": choices["data.loader"]})
    where = f"{config.data.source} {look_up(config, Section('data', Location))}"
    absent = False
    location = look_up(config, Section("data", Location)).model_dump()
    try:
        source = (read or {}).get(where) or digest.of(config.data)
    except UserError as error:
        as_it_was = known.get("chosen") == session.chosen_images(config)
        as_it_was = as_it_was and known.get("location", location) == location
        if as_it_was and not _is_there(config.data):
            source = known["source"]  # what was made of the images still counts
            if not quiet:
                print(f"warning: {error}; what was made of them counts", file=sys.stderr)
        elif dry_run and not _is_there(config.data) and sources.expected(config.data):
            source, absent = f"not here: {where}", True
        else:
            raise
    if not absent and _is_there(config.data):
        check_held_out(config)
    if read is not None and not absent:
        read[where] = source
    if config.evaluate.plain == "auto":
        if not (same and "evaluate.plain" in choices):
            choices["evaluate.plain"] = plain_network(config, source, absent)
        config = load.changed(config, {"evaluate.plain": choices["evaluate.plain"]})
    return Resolved(config, source, asked, absent)


def check_held_out(config: Any) -> None:
    """Raise `UserError` for shards without the validation images that the config asks for. What
    other sources hold out, the config says itself."""
    asked = {"evaluate.split": "val", "choose.how": "always"}
    wanted = [f"{at}={v}" for at, v in asked.items() if look_up(config, at) == v]
    folder = Path(config.data.path)
    if config.data.source != "shards" or not wanted:
        return
    if "val" not in files.read_json(folder / "manifest.json")["splits"]:
        raise UserError(
            f"{folder} has no validation images, which {' and '.join(wanted)} asks for: shard the "
            "set again with data.val_fraction or data.val_per_class"
        )


def _is_there(data: Any) -> bool:
    """Whether there is something at the place of the images: an error is of what is in it then.
    An empty folder is where a file system is to be mounted."""
    path = Path(data.path)
    try:
        empty = path.is_dir() and not any(path.iterdir())
    except OSError:
        empty = False  # it is there, and may not be read
    return bool(data.path) and path.exists() and not empty


def plain_network(config: Any, source: str, absent: bool = False) -> str:
    """ "own" where the plain network is cheap beside the run, where no expert could stand in, or
    where the protocol trains it whatever it costs. "none" where the expert is from elsewhere: how
    it was trained is not known.

    `absent`: the images are not here, and what the config expects of them has to do.
    """
    own = load.changed(config, {"evaluate.plain": "own"})
    if PROTOCOLS[config.protocol].plain or "teacher" not in recipe.experts(own):
        return "own"
    nodes = graph.build(recipe.stages(own, source), own)
    facts = sources.expected(config.data) if absent else sources.facts(config.data)
    costs = {
        name: function(node.stage.cost)(node.settings, facts).flops
        for name, node in nodes.items()
        if node.stage.cost
    }
    plain = sum(cost for name, cost in costs.items() if name.startswith("student/plain-"))
    if plain <= SHARE * sum(costs.values()):
        return "own"
    return "none" if is_brought(own) else "expert"


def make_request(
    resolved: Resolved, targets: tuple[str, ...], out: Path, store: Path, **more: Any
) -> Request:
    """`more`: the other fields of a request."""
    return Request(
        config=load.to_yaml(resolved.config),
        targets=targets,
        out=str(out.absolute()),
        store=str(store.absolute()),
        source=resolved.source,
        asked=resolved.asked,
        **more,
    )


def known_facts(config: Any, source: str, store: Path) -> Facts:
    """What is known of the set: from its shards where they are written, else from its source."""
    nodes = graph.build(recipe.stages(config, source), config)
    folder = nodes[recipe.SHARD].folder(store)
    if (folder / "manifest.json").exists():
        return shards.facts(folder)
    return sources.facts(config.data)


def perform(request: Request) -> int:
    """A request as one rank of however many: enter, work, finish. Returns the exit code."""
    return guarded(lambda: take_part(Session(request)))


def take_part(work: Session) -> int:
    """Work as one rank of however many that others started; rank 0 sees to the run folder."""
    leads = place.here().is_main and not place.here().rendezvous
    if leads:
        session.enter(work)
    if work.targets:
        session.execute(work)
    return finish(work) if leads else 0


def finish(work: Session) -> int:
    """Note what is done, write the report where it is asked for, say where things are."""
    from ltdd_scale.publish import hub, tables

    session.note(work)
    if not work.request.report:
        for target in work.request.targets:
            print(_done(work, target))
        return 0
    session.publish(work)
    out = work.out
    print(tables.table(files.read_json(out / "results.json")))
    print(f"\nexported images  {out / 'distilled' / 'images'}")
    print(f"results           {out / 'results.json'}, {out / 'results.md'}")
    print(f"page to look at   {out / 'report.html'}")
    if not work.config.publish.license:
        print(f"\n{hub.ASKS}")
    return 0


def _done(work: Session, target: str) -> str:
    if work.request.part:
        k, n = work.request.part
        return f"{target}: part {k} of {n} done"
    if target in work.nodes:
        return f"{target}: done, in {work.nodes[target].folder(work.store)}"
    return f"{target}: done"
