import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import simulate_scale as sim

from ltdd_scale.methods.rldd.chunks import chunks


def test_counts_are_those_of_imagenet_lt():
    counts = sim.class_counts(sim.Work())
    assert counts.max() == 1280 and counts.min() == 5 and abs(int(counts.sum()) - 115_846) < 1200


def test_more_gpus_divide_the_work_that_the_stages_have():
    m, w = sim.Machine(latency_us=0, local_gb=1e9, network_gb=1e9, decode=1e9, floor=0), sim.Work()
    for world in (1, 2, 8, 64):
        ideal = {name: stage(1, m, w)[0] / world for name, stage in sim.STAGES.items()}
        for name, stage in sim.STAGES.items():
            assert ideal[name] <= stage(world, m, w)[0] * (1 + 1e-9) <= ideal[name] * 1.6, (
                name,
                world,
            )
    assert sim.expert(8, m, w)[0] == pytest.approx(sim.expert(1, m, w)[0] / 8)


def test_nothing_goes_faster_than_its_units():
    m, w = sim.Machine(), sim.Work()
    count = len(chunks(w.classes, w.ipc, w.chunk, w.chunk_classes))
    assert (
        sim.recover(count, m, w)[0]
        == sim.recover(10 * count, m, w)[0]
        == w.iterations * m.recover_ms / 1e3
    )
    assert sim.recover(2 * count, m, w)[1] == "fewer chunks than GPUs"
    assert sim.calibrate(256, m, w)[0] >= sim.passes(w)[0] * w.largest / 128 * m.forward_ms / 1e3


def test_a_lead_spares_most_passes():
    w = sim.Work()
    led, without = sim.passes(w)[0], sim.passes(sim.Work(lead=0))[0]
    assert without == 27 and 7 < led < 8
