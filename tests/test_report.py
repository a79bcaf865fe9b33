import numpy as np

from ltdd_scale import export, page, report


def entry(which, labels, top1):
    numbers = {n: top1 for n in ("top1", "top5", "class_std", "many", "medium", "few")}
    return {
        "set": which,
        "labels": labels,
        "net": "n",
        "ipc": 10,
        "num_seeds": 2,
        **numbers,
        **{f"{n}_std": 0.5 for n in numbers},
        "few": None,
        "per_class": [top1, top1],
    }


RESULTS = {
    "rows": [],
    "matrix": [1],
    "summary": {
        "labels": "single",
        "split": "test",
        "students": [
            entry(s, y, 40 + k)
            for k, (s, y) in enumerate(
                (s, y)
                for s in ("distilled", "random", "initial")
                for y in ("online", "stored", "single", "hard")
            )
        ],
        "experts": {
            "teacher": {
                "net": "n",
                **{n: 51.0 for n in ("top1", "top5", "class_std", "many", "medium", "few")},
            }
        },
    },
}


def test_the_table_shows_the_set_beside_random_real_images():
    text = report.table({**RESULTS, "matrix": []})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines()[2:]}
    assert set(rows) == {"distilled", "random real", "teacher"}
    assert (
        "42.0 ± 0.5" in rows["distilled"]
        and "46.0 ± 0.5" in rows["random real"]
        and "–" in rows["distilled"]
    )


def test_the_matrix_has_every_cell():
    lines = report.matrix_table(RESULTS).splitlines()
    assert len(lines) == 5 and [c.strip() for c in lines[4].split("|")[2:6]] == [
        "40.0 ± 0.5",
        "41.0 ± 0.5",
        "42.0 ± 0.5",
        "43.0 ± 0.5",
    ]
    assert "The label matrix" in report.table(RESULTS)


def test_class_folders_sort_in_label_order():
    assert export.folder_names(["a", "b", "c"]) == ["a", "b", "c"]
    for classes in (["b", "a"], ["10", "9"], ["a", "a"], ["x/y", "a b"]):
        names = export.folder_names(classes)
        assert (
            names == sorted(names)
            and len(set(names)) == len(classes)
            and not any("/" in n for n in names)
        )


def test_charts_and_sheets_are_drawn_for_one_class_and_for_a_thousand():
    for n in (1, 10, 1000):
        counts = np.arange(n, 0, -1)
        svg = page.bars([f"<{k}>" for k in range(n)], counts, {"distilled": [50.0] * n})
        assert svg.count("<rect") == n + 1 and "<0>" not in svg
    assert (
        page.curves({"a": [1.0]}, "epochs") == ""
        and page.curves({"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0]}, "epochs").count("<polyline") == 2
    )
    images = [np.zeros((2, 3, 4, 4), np.uint8)] * 3
    assert "data:image/png;base64," in page.contact_sheet([images, images, images], 2)
