"""The ladder of a result, and the warning of a teacher that is not at its top."""

import pytest
from report_tools import entry, plain

from ltdd_scale.judging import ladder
from ltdd_scale.judging.metrics import mean_of
from ltdd_scale.results import NUMBERS, RANDOM_PLAIN_TITLE, is_adjusted, plain_name

LABELS, MADE = "its labels cost accuracy", "what is made with it may cost accuracy"


def summary_of(teacher=90.0, random=95.7, whole=(76.0, 87.8), title="plain, whole set"):
    """A verdict's summary with these accuracies; without a rung where one is None."""
    students = [entry("distilled", "single", 88.1), entry("random", "single", 93.8)]
    if random is not None:
        students += [entry("random", "hard", random), entry("random", "hard", 1.0, net="second")]
    titles = (title, f"{title.removesuffix(', whole set')}, logit-adjusted")
    rows = [plain(t, value) for t, value in zip(titles, whole, strict=False)]
    experts = {"observer": {"net": "o", **dict.fromkeys(NUMBERS, 99.0)}}
    if teacher is not None:
        numbers = {**dict.fromkeys(NUMBERS, teacher), "few": None, "per_class": [teacher]}
        experts["teacher"] = {"net": "t", **numbers}
    return {"students": students, "experts": experts} | ({"plain": rows} if rows else {})


def said(labelled=True, **values):
    return ladder.warnings(ladder.rungs(summary_of(**values)), labelled)


def test_rungs_stand_in_their_order_with_their_numbers():
    found = ladder.rungs(summary_of())
    titles = ["plain, whole set", "plain, logit-adjusted", RANDOM_PLAIN_TITLE, "teacher"]
    assert [r["title"] for r in found] == titles
    assert [r["what"] for r in found] == [
        "the plain network",
        "the plain network after logit adjustment",
        "random real images with plain labels",
        "the teacher",
    ]
    assert [r["net"] for r in found] == ["n", "n", "n", "t"]
    assert [r["balanced"] for r in found] == [76.0, 87.8, 95.7, 90.0]
    assert [r["num_seeds"] for r in found] == [2, 2, 2, 1]
    assert [r["balanced_std"] for r in found] == [None, None, 0.5, None]
    numbers = {n for n in mean_of([{**dict.fromkeys(NUMBERS, 1.0), "per_class": []}])}
    assert all(set(r) == {"title", "what", "net"} | numbers - {"per_class"} for r in found)
    assert found[3]["few"] is None


def test_a_run_without_a_rung_has_the_others():
    assert [r["title"] for r in ladder.rungs(summary_of(teacher=None, whole=()))] == [
        RANDOM_PLAIN_TITLE
    ]
    assert ladder.rungs({"students": [], "experts": {}}) == []
    stand_in = ladder.rungs(summary_of(title="teacher's plain head", random=None))
    assert [r["what"] for r in stand_in][:2] == [
        "the teacher's plain head",
        "the teacher's plain head after logit adjustment",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "the teacher (90.0) is worse than random real images with plain labels (95.7)"),
        (
            {"teacher": 39.7, "random": 35.1, "whole": (30.0, 48.8)},
            "the teacher (39.7) is worse than the plain network after logit adjustment (48.8)",
        ),
        (
            {"teacher": 50.0, "random": 40.0, "whole": (50.0, 49.0)},
            "the teacher (50.0) is no better than the plain network (50.0)",
        ),
        # Equal as they are shown, whichever is a little more.
        (
            {"teacher": 95.72, "whole": ()},
            "the teacher (95.7) is no better than random real images with plain labels (95.7)",
        ),
        (
            {"random": None, "title": "teacher's plain head", "whole": (80.0, 91.26)},
            "the teacher (90.0) is worse than the teacher's plain head after logit adjustment "
            "(91.3)",
        ),
    ],
)
def test_a_teacher_that_is_not_above_all_is_warned_of_in_one_sentence(values, words):
    assert said(**values) == [f"{words}: {LABELS}"]
    assert said(labelled=False, **values) == [f"{words}: {MADE}"]


def test_where_both_label_their_mean_is_the_rung():
    summary = summary_of(teacher=96.0)
    assert ladder.warnings(ladder.rungs(summary), True) == []
    summary["experts"]["teacher + observer"] = {"net": "t + o", **dict.fromkeys(NUMBERS, 95.0)}
    found = ladder.rungs(summary)
    assert [r["title"] for r in found].count("teacher") == 0 and found[-1]["net"] == "t + o"
    words = (
        "teacher and observer together (95.0) are worse than random real images with plain labels "
        "(95.7)"
    )
    assert ladder.warnings(found, True) == [f"{words}: their labels cost accuracy"]
    assert ladder.warnings(found, False) == [f"{words}: what is made with them may cost accuracy"]


@pytest.mark.parametrize(
    "values", [{"teacher": 95.8}, {"teacher": None}, {"random": None, "whole": ()}]
)
def test_a_teacher_above_all_or_alone_is_not(values):
    assert said(**values) == []


def test_balanced_accuracy_counts():
    found = ladder.rungs(summary_of(teacher=90.0, random=80.0, whole=()))
    found[-1] |= {"top1": 10.0}
    assert ladder.warnings(found, True) == []
    found[-1] |= {"top1": 90.0, "balanced": 79.0}
    assert len(ladder.warnings(found, True)) == 1


def test_names_of_plain_networks():
    assert plain_name("plain, whole set") == plain_name("plain, logit-adjusted")
    assert plain_name("teacher's plain head, logit-adjusted") == "the teacher's plain head"
    for end in ("", ", logit-adjusted"):
        name = plain_name(f"teacher, prior put back{end}")
        assert name == "the teacher with the prior put back"
    assert is_adjusted("plain, logit-adjusted") and not is_adjusted("plain, whole set")
