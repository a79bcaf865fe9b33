import json

from conftest import TINY, cli

from ltdd_scale import config, graph


def nodes(tmp_path, *sets):
    path = tmp_path / "a.yaml"
    path.write_text(TINY)
    return graph.graph(config.load(path, sets))


def differ(a, b):
    return {n for n in a if not n.startswith("student/") and a[n].fingerprint != b[n].fingerprint}


def test_two_ipcs_share_experts_and_calibration(tmp_path):
    assert differ(nodes(tmp_path), nodes(tmp_path, "ipc=5")) == {
        "initialize",
        "recover",
        "relabel",
        "evaluate",
    }


def test_a_setting_changes_what_reads_it_and_what_follows(tmp_path):
    base = nodes(tmp_path)
    assert differ(base, nodes(tmp_path, "recover.lr=1")) == {"recover", "relabel", "evaluate"}
    assert differ(base, nodes(tmp_path, "observer.lr=1")) == {
        "observer",
        "calibrate",
        "recover",
        "relabel",
        "evaluate",
    }
    assert differ(base, nodes(tmp_path, "teacher.lr=1")) == {
        "teacher",
        "initialize",
        "recover",
        "relabel",
        "evaluate",
    }
    assert differ(base, nodes(tmp_path, "data.split_seed=1")) == set(graph_names(base))
    assert differ(base, nodes(tmp_path, "runtime.threads=2", "runtime.workers=1")) == set()
    assert differ(base, nodes(tmp_path, "strategies.debias=false")) == set(graph_names(base)) - {
        "shard"
    }
    assert differ(base, nodes(tmp_path, "strategies.calibrate=false")) == {
        "calibrate",
        "recover",
        "relabel",
        "evaluate",
    }
    assert differ(base, nodes(tmp_path, "strategies.confident_init=false")) == {
        "initialize",
        "recover",
        "relabel",
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
    assert len({(n.stage, n.fingerprint) for n in found.values()}) == len(found) > 70


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
    saved = graph.complete(folder)
    assert (
        saved["stage"] == "experts"
        and set(saved["files"]) == {"weights.pt", "log.json"}
        and graph.damage(folder) == []
    )


def test_status_tells_done_stale_and_missing(finished, tmp_path):
    config_file, run = finished
    assert "everything is done" in cli("status", run).stdout
    store = run.parent / "store"
    done = cli("initialize", config_file, "--out", tmp_path / "r", "--store", store, "--nproc", 1)
    assert done.returncode == 0
    said = cli("status", tmp_path / "r").stdout
    assert said.count(" done ") >= 8, "all stages are in the shared store"
    done = cli(
        "calibrate",
        config_file,
        "--out",
        tmp_path / "r",
        "--store",
        store,
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
