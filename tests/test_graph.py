import json

import pytest
import torch
from conftest import TINY, cli

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.errors import UserError
from ltdd_scale.pipeline import graph, run, store
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Division, Stage


def nodes(tmp_path, *sets, source="x"):
    path = tmp_path / "a.yaml"
    path.write_text(TINY)
    config = load.load(path, sets)
    return graph.build(recipe.stages(config, source), config)


def differ(a, b):
    return {n for n in a if not n.startswith("student/") and a[n].fingerprint != b[n].fingerprint}


def test_two_ipcs_share_experts_and_calibration(tmp_path):
    assert differ(nodes(tmp_path), nodes(tmp_path, "ipc=5")) == {
        "initialize",
        "recover",
        "relabel",
        "embedding",
        "evaluate",
    }


def test_a_setting_changes_what_reads_it_and_what_follows(tmp_path):
    base = nodes(tmp_path)
    assert differ(base, nodes(tmp_path, "recover.lr=1")) == {
        "recover",
        "relabel",
        "embedding",
        "evaluate",
    }
    assert differ(base, nodes(tmp_path, "observer.lr=1")) == {
        "observer",
        "calibrate",
        "recover",
        "relabel",
        "embedding",
        "evaluate",
    }
    assert differ(base, nodes(tmp_path, "teacher.lr=1")) == {
        "teacher",
        "initialize",
        "recover",
        "relabel",
        "embedding",
        "evaluate",
    }
    assert differ(base, nodes(tmp_path, "data.split_seed=1")) == set(graph_names(base))
    assert differ(base, nodes(tmp_path, "runtime.threads=2", "runtime.workers=1")) == set()
    assert differ(base, nodes(tmp_path, "train.clip=1")) == set(graph_names(base)) - {"shard"}
    assert differ(base, nodes(tmp_path, "calibrate.fair=false")) == {
        "calibrate",
        "recover",
        "relabel",
        "embedding",
        "evaluate",
    }
    assert differ(base, nodes(tmp_path, "initialize.select=random")) == {
        "initialize",
        "recover",
        "relabel",
        "embedding",
        "evaluate",
    }


def graph_names(found):
    return [n for n in found if not n.startswith("student/")]


def test_every_student_has_its_own_folder(tmp_path):
    found = nodes(
        tmp_path,
        "evaluate.matrix=true",
        "evaluate.seeds=3",
        "evaluate.full_epochs=2",
        "evaluate.nets=[convnet3,resnet32]",
    )
    assert len({(n.kind, n.fingerprint) for n in found.values()}) == len(found) > 70


def test_more_seeds_keep_the_students_that_are_there(tmp_path):
    a, b = (
        nodes(tmp_path),
        nodes(tmp_path, "evaluate.seeds=2", "evaluate.matrix=true", "relabel.labels=stored"),
    )
    assert {n: a[n].fingerprint for n in a if n.startswith("student/")}.items() <= {
        n: b[n].fingerprint for n in b
    }.items()


def test_a_change_of_labels_keeps_the_students_with_other_labels(tmp_path):
    """The distilled set's students with the labels that relabel makes read them from there; all others are left alone."""
    a, b = (
        nodes(tmp_path, "evaluate.matrix=true", "evaluate.full_epochs=2", *more)
        for more in (["relabel.labels=single"], ["relabel.labels=online", "relabel.topk=2"])
    )
    changed = {
        n for n in a if n.startswith("student/") and n in b and a[n].fingerprint != b[n].fingerprint
    }
    assert changed == {
        "student/distilled-single-convnet3-s0",
        "student/distilled-online-convnet3-s0",
    } | {f"student/{s}-stored-convnet3-s0" for s in ("random", "initial", "distilled")}


def test_only_what_a_stage_needs(tmp_path):
    found = nodes(tmp_path)
    assert graph.needed(found, ["initialize"]) == ["shard", "teacher", "initialize"]
    assert graph.needed(found, ["calibrate"]) == ["shard", "observer", "calibrate"]


def test_complete_means_there_and_true(finished):
    _, run = finished
    record = json.loads((run / "run.json").read_text())
    folder = run.parent / "store" / record["stages"]["teacher"]
    saved = store.complete(folder)
    assert (
        saved["stage"] == "experts"
        and set(saved["files"]) == {"weights.pt", "log.json", "log.jsonl"}
        and store.damage(folder) == []
    )


def test_status_tells_done_stale_and_missing(finished, tmp_path):
    config_file, run = finished
    assert "everything is done" in cli("status", run).stdout
    shared = run.parent / "store"
    done = cli("initialize", config_file, "--out", tmp_path / "r", "--store", shared, "--nproc", 1)
    assert done.returncode == 0
    said = cli("status", tmp_path / "r").stdout
    assert said.count(" done ") >= 8, "all stages are in the shared store"
    done = cli(
        "calibrate",
        config_file,
        "--out",
        tmp_path / "r",
        "--store",
        shared,
        "--nproc",
        1,
        "--set",
        "ipc=3",
        "calibrate.variance=within",
    )
    assert done.returncode == 0, done.stderr
    said = {
        line.split()[0]: line.split()[1]
        for line in cli("status", tmp_path / "r").stdout.splitlines()[1:-1]
    }
    assert (
        said["calibrate"] == "done"
        and said["initialize"] == "stale"
        and said["recover"] == "missing"
    ), said


def test_the_source_counts_and_not_where_it_lies(tmp_path):
    base = nodes(tmp_path)
    assert differ(base, nodes(tmp_path, source="y")) == set(graph_names(base))
    assert differ(base, nodes(tmp_path, "data.path=/elsewhere")) == set()


def test_the_decoder_is_hashed(tmp_path):
    base = nodes(tmp_path, "data.loader=torch")
    changed = differ(base, nodes(tmp_path, "data.loader=dali"))
    assert changed == set(graph_names(base)) - {"shard"}


def test_a_stage_cannot_read_what_is_not_hashed(tmp_path):
    settings = nodes(tmp_path)["recover"].settings
    assert settings.recover.iterations == 12 and settings.ipc == 4
    with pytest.raises(AttributeError, match="recover does not read 'evaluate'"):
        _ = settings.evaluate
    with pytest.raises(AttributeError, match="frozen"):
        settings.ipc = 5


def test_labels_that_need_no_teacher_train_none(tmp_path):
    """With hard labels only the method itself may ask for experts."""
    without = ("initialize.select=random", "recover.teacher_ce=0", "recover.settle=0")
    found = nodes(tmp_path, "relabel.labels=hard", *without)
    assert "teacher" not in found and "observer" in found
    found = nodes(tmp_path, "relabel.labels=hard")
    assert "teacher" in found
    students = [n for name, n in found.items() if name.startswith("student/")]
    assert all("teacher" not in s.stage.inputs for s in students)


def test_students_have_their_own_net(tmp_path):
    base = nodes(tmp_path)
    other = nodes(tmp_path, "evaluate.width=16")
    assert differ(base, other) == {"embedding", "evaluate"}
    assert differ(base, nodes(tmp_path, "teacher.width=16")) >= {"teacher", "initialize"}


def test_parts_are_for_stages_that_have_them(tmp_path):
    found = nodes(tmp_path)
    graph.check_part(found, ["recover"], (0, 2))
    graph.check_part(found, graph.goals(found, ["students"]), (0, 2))
    with pytest.raises(
        UserError, match="calibrate cannot be done in parts, only recover and students"
    ):
        graph.check_part(found, ["calibrate"], (0, 2))
    together = [*graph.goals(found, ["students"]), "recover"]
    with pytest.raises(UserError, match="of one job at a time, not of students and recover"):
        graph.check_part(found, together, (0, 2))
    with pytest.raises(UserError, match="no stage 'match'"):
        graph.goals(found, ["match"])


def hungry(settings, context):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_too_little_memory_on_a_gpu_is_one_line_that_says_what_to_lower(tmp_path):
    stage = Stage("recover", "x", 1, f"{__name__}:hungry", smaller="recover.batch_size or ipc")
    found = graph.build([stage], None)
    how = run.How(facts=lambda: None, workers=0, checkpoint_seconds=1, quiet=True)
    alone = Ranks(0, 1, torch.device("cpu"), None)
    with pytest.raises(UserError, match=r"cpu has: lower recover\.batch_size or ipc \(CUDA out of"):
        run.bring_up_to_date(found, tmp_path, ["recover"], alone, how)


def unit(name, group, reads=()):
    inputs = {n: n for n in reads}
    return Stage(name, "unit", 1, "", inputs=inputs, division=Division.UNITS, group=group)


def test_units_are_done_group_after_group_where_the_first_of_them_stands():
    stages = [
        Stage("shard", "shard", 1, ""),
        unit("a/0", "a", ["shard"]),
        unit("b/0", "b", ["a/0"]),
        unit("a/1", "a", ["shard"]),
        unit("b/1", "b", ["a/1"]),
        Stage("b", "b", 1, "", inputs={"one": "b/0", "two": "b/1"}),
        unit("alone", "", ["b"]),
        unit("c/0", "c", ["b"]),
    ]
    found = graph.build(stages, None)
    names = graph.needed(found, list(found))
    done = [["shard"], ["a/0", "a/1"], ["b/0", "b/1"], ["b"], ["alone"], ["c/0"]]
    assert run.batches(found, names) == done
    before: set[str] = set()
    for batch in done:
        assert all(set(found[name].inputs) <= before for name in batch)
        before |= set(batch)
    assert run.batches(found, ["b/1", "b"]) == [["b/1"], ["b"]]
