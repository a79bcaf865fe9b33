import datetime
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from ltdd_scale.errors import PassingError, UserError
from ltdd_scale.runtime import place, ranks

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}  # a batch script: no step


@pytest.fixture
def env(monkeypatch):
    """Sets the environment of this process, which knows nothing of its place yet."""
    monkeypatch.setattr(place, "_here", None)
    for name in (*STEP, *place.TORCHRUN, place.RENDEZVOUS, "MASTER_ADDR", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(k, v) for k, v in values.items()]


@pytest.mark.parametrize("values", [{}, BATCH, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}])
def test_nobody_started_us(values):
    found = place.read(values)
    assert not found.launched and not found.in_step and (found.rank, found.world_size) == (0, 1)
    assert found.in_slurm == bool(values)


def test_a_slurm_step_is_taken_for_ranks():
    found = place.read(STEP)
    assert found.launched and found.in_step and not found.is_main
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)


@pytest.mark.parametrize(
    ("said", "local_size"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),4,1"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 2),
        ({}, 4),
    ],
)
def test_how_many_ranks_a_node_has(said, local_size):
    assert place.read({**STEP, **said}).local_size == local_size


def test_torchrun_in_a_slurm_step_wins():
    env = {**STEP, "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    assert place.read(env).world_size == 8
    # With an address they meet there, and not by a note in a shared folder.
    assert not place.read({**env, "MASTER_ADDR": "node1"}).in_step
    alone = place.read({**env, place.RENDEZVOUS: "file:///tmp/x"})
    assert alone.rendezvous == "file:///tmp/x" and not alone.in_step


@pytest.mark.parametrize("lacking", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"])
def test_a_half_set_step_is_refused(lacking):
    with pytest.raises(UserError, match=f"but not {lacking}: start with srun"):
        place.read({k: v for k, v in STEP.items() if k != lacking})


def test_half_of_torchrun_is_refused_in_a_step_too():
    with pytest.raises(UserError, match="has RANK but not WORLD_SIZE, LOCAL_RANK"):
        place.read({**STEP, "RANK": "0"})


def test_attempts_have_names_of_their_own():
    again = {**STEP, "SLURM_RESTART_COUNT": "2"}
    assert place.read(STEP).step == "7.0.0" and place.read(again).step == "7.0.2"
    assert (place.read(STEP).attempt, place.read(again).attempt) == (0, 2)


def test_elements_of_an_array_are_jobs_of_their_own():
    element = {**STEP, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert place.read(element).job == "5_3" and place.read(STEP).job == "7"


def test_the_environment_is_read_once(env):
    env(STEP)
    assert place.here().rank == 3
    env({"SLURM_PROCID": "1"})
    assert place.here().rank == 3


def test_one_task_is_one_rank_and_no_launcher(env):
    """A job of one task is a rank, not a machine on which ranks are to be started."""
    env({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert not place.read(STEP | {"SLURM_STEP_NUM_TASKS": "1"}).launched
    here = place.become_task()
    assert here.launched and here.is_main and here.world_size == 1 and place.here() is here


def test_a_task_does_not_meet_where_its_submitter_met(env):
    env({**STEP, "MASTER_ADDR": "elsewhere", place.RENDEZVOUS: "file:///tmp/x"})
    here = place.become_task()
    assert here.in_step and here.rendezvous == "" and (here.rank, here.world_size) == (3, 4)


def test_ranks_that_cannot_work_together_are_refused():
    first, second = (ranks.Compute("cuda", gpu, "bfloat16") for gpu in ("GPU-a", "GPU-b"))
    ranks.refuse_unlike([first, second])
    cpu = ranks.Compute("cpu", "", "bfloat16")
    ranks.refuse_unlike([cpu, cpu])
    said = r"different devices \(cuda: rank 0, 2; cpu: rank 1\)"
    with pytest.raises(UserError, match=said) as wrong:
        ranks.refuse_unlike([first, cpu, second])
    assert wrong.type is UserError
    with pytest.raises(PassingError, match=said):  # another node may have its GPU
        ranks.refuse_unlike([first, cpu, second], in_slurm=True)
    with pytest.raises(UserError, match=r"ranks share a GPU \(GPU-a: rank 0, 2\)"):
        ranks.refuse_unlike([first, second, first])
    ranks.refuse_unlike([first, second, first], per_gpu=2)
    with pytest.raises(UserError, match=r"GPU-a: rank 0, 1, 2"):
        ranks.refuse_unlike([first, first, first, second], per_gpu=2)
    assert ranks.backends("cuda") == "cpu:gloo,cuda:nccl"
    assert ranks.backends("cuda", 2) == ranks.backends("cpu") == "gloo"
    h100, a100 = (own._replace(model=m) for own, m in ((first, "H100"), (second, "A100")))
    with pytest.raises(UserError, match=r"different GPUs \(H100: rank 0; A100: rank 1\)"):
        ranks.refuse_unlike([h100, a100])
    with pytest.raises(
        UserError, match=r"different precisions \(bfloat16: rank 0; float32: rank 1"
    ):
        ranks.refuse_unlike([first, second._replace(precision="float32")])


def test_a_collective_of_gpus_that_hangs_ends_and_a_wait_on_cpus_does_not():
    days = datetime.timedelta(days=2)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=days)
    try:
        cpu = torch.device("cpu")
        backend = dist.group.WORLD._get_backend(cpu)
        assert backend.options._timeout == days
        ranks._end_hanging_collectives(cpu)  # of the device that is said, here gloo's
        assert backend.options._timeout == ranks.HANGS < days
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_compare_what_they_compute_in_before_any_collective(tmp_path):
    code = (
        "import sys; from ltdd_scale.runtime import ranks\n"
        "from ltdd_scale.errors import UserError\n"
        "try: ranks.join('cpu', sys.argv[1], 1)\n"
        "except UserError as error: print(error)"
    )
    started = []
    for rank, precision in enumerate(("float32", "bfloat16")):
        own = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
        own[place.RENDEZVOUS] = f"file://{tmp_path}/meet"
        env = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, "-c", code, precision]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    for process in started:
        said, _ = process.communicate(timeout=100)
        assert "different precisions (float32: rank 0; bfloat16: rank 1)" in said
