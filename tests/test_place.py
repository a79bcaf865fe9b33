import pytest

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import place

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
}


def test_nobody_started_us():
    assert place.adopt({}) is False
    assert (
        place.adopt({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is False
    )  # a batch script: no step
    assert place.adopt({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is False  # srun --pty bash


def test_a_slurm_step_is_taken_for_ranks():
    env = dict(STEP)
    assert place.adopt(env) and (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == (
        "3",
        "4",
        "1",
    )


def test_torchrun_in_a_slurm_step_wins():
    env = {**STEP, "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    assert place.adopt(env) and env["WORLD_SIZE"] == "8"


@pytest.mark.parametrize("lacking", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"])
def test_a_half_set_step_is_refused(lacking):
    with pytest.raises(UserError, match=f"but not {lacking}: start with srun"):
        place.adopt({k: v for k, v in STEP.items() if k != lacking})


def test_half_of_torchrun_is_refused_in_a_step_too():
    with pytest.raises(UserError, match="has RANK but not WORLD_SIZE, LOCAL_RANK"):
        place.adopt({**STEP, "RANK": "0"})


def test_attempts_have_names_of_their_own():
    assert (
        place.attempt(STEP) == "7.0.0"
        and place.attempt({**STEP, "SLURM_RESTART_COUNT": "2"}) == "7.0.2"
    )
