import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltdd_scale import evaluate
from ltdd_scale.config import Config, Evaluate
from ltdd_scale.graph import units


def test_metrics_by_hand():
    logits = torch.tensor(
        [
            [3.0, 2, 1, 0, -1, -2],
            [3, 2, 1, 0, -1, -2],
            [0, 3, 0, 0, 0, 0],
            [5, 4, 3, 2, 1, 0],
            [0, 0, 9, 0, 0, 0],
            [0, 0, 0, 9, 0, 0],
            [0, 0, 0, 0, 9, 0],
            [9, 8, 7, 6, 5, 4],
        ]
    )
    labels = np.asarray([0, 1, 1, 5, 2, 3, 4, 0])
    found = evaluate.metrics(logits, labels, ["many", "many", "medium", "medium", "few", "few"])
    per_class = [100.0, 50.0, 100.0, 100.0, 100.0, 0.0]
    assert found["per_class"] == per_class and found["top1"] == 75.0 and found["top5"] == 87.5
    assert found["class_std"] == pytest.approx(np.std(per_class), abs=1e-3) and (
        found["many"],
        found["medium"],
        found["few"],
    ) == (75.0, 100.0, 50.0)
    assert evaluate.metrics(logits, labels, ["few"] * 6)["many"] is None


def test_random_real_takes_every_image_of_a_small_class_first():
    labels = np.asarray([0] * 20 + [1] * 3)
    chosen = evaluate.random_real(labels, 2, 7, seed=0)
    assert (
        labels[chosen].tolist() == [0] * 7 + [1] * 7
        and len(set(chosen[:7])) == 7
        and set(chosen[7:10]) == {20, 21, 22}
    )
    assert chosen.tolist() != evaluate.random_real(labels, 2, 7, seed=1).tolist()


def test_student_loss_is_its_formula():
    torch.manual_seed(0)
    s, y, t = torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), torch.randn(4, 3)
    onehot = F.one_hot(y, 3).float()
    assert torch.allclose(
        evaluate.student_loss(s, onehot, t, 0.025, 1.0),
        0.025 * F.cross_entropy(s, y) + ((s - t) ** 2).mean(),
    )
    assert torch.allclose(evaluate.student_loss(s, onehot, None, 0.025, 1.0), F.cross_entropy(s, y))


def test_schedules():
    assert [
        round(evaluate.learning_rate(Evaluate(schedule="cosine2", lr=1.0), t), 6)
        for t in (0, 0.5, 1)
    ] == [1.0, 0.853553, 0.5]
    steps, cosine = Evaluate(schedule="steps", lr=1.0), Evaluate(schedule="cosine", lr=1.0)
    assert [evaluate.learning_rate(steps, d) for d in (0, 0.79, 0.8, 0.9, 0.95)] == [
        1,
        1,
        0.5,
        0.25,
        0.125,
    ]
    assert evaluate.learning_rate(cosine, 0) == 1 and evaluate.learning_rate(
        cosine, 0.5
    ) == pytest.approx(0.5)


def test_units_of_the_matrix_are_all_cells_once():
    config = Config()
    config.evaluate.matrix, config.evaluate.seeds, config.evaluate.full_epochs = True, 2, 3
    found = [(u["set"], u["labels"], u["seed"]) for u in units(config)]
    assert len(found) == len(set(found)) == (3 * 4 + 1) * 2
    config.evaluate.matrix = False
    assert {(u["set"], u["labels"]) for u in units(config)} == {
        ("distilled", "online"),
        ("random", "online"),
        ("full", "online"),
    }


def test_summary_is_mean_and_sample_deviation():
    rows = [
        {
            "set": "distilled",
            "labels": "online",
            "net": "n",
            "ipc": 1,
            "seed": s,
            "top1": v,
            "top5": 90.0,
            "class_std": 1.0,
            "many": None,
            "medium": v,
            "few": v,
            "per_class": [v, v],
        }
        for s, v in enumerate((40.0, 42.0, 47.0))
    ]
    (entry,) = evaluate.summarize(rows)
    assert (
        entry["top1"] == 43.0
        and entry["top1_std"] == pytest.approx(np.std([40, 42, 47], ddof=1), abs=0.01)
        and entry["many"] is None
        and entry["num_seeds"] == 3
    )
