"""Trainings of two processes of which one ends or stops: the other says so in one sentence and ends."""

from __future__ import annotations

import signal
import socket
import textwrap
import time

import pytest
from forked import Forked
from screens import SMALL

# The waits are cut down to seconds; what is done in them is the same.
PROCESS = """
    import os, signal, sys, time
    from datetime import timedelta
    from cellfast.training import distributed, loop
    from cellfast.training.config import TrainConfig
    from cellfast.training.step import TrainingStep
    from cellfast.training.validation import Validation

    distributed.BEAT_S, distributed.SILENCE, distributed.GRACE_S = 0.2, timedelta(seconds={silence}), 1.0
    rank = int(os.environ["RANK"])
    update, measure, steps = TrainingStep.update, Validation.measure, []

    def counted(self, loss):
        steps.append(1)
        if len(steps) == 3:
            {at_step_3}
        update(self, loss)

    def slow(self, model):
        {in_validation}
        return measure(self, model)

    TrainingStep.update, Validation.measure = counted, slow
    config = TrainConfig(**{values})
    from cellfast import cli
    from cellfast.errors import told_at_command_line
    def cellfast(**_):
        with told_at_command_line():
            loop.train({screen!r}, {run!r}, config, say=print)
    cli.cellfast = cellfast
    cli.main()
    print("ended well", flush=True)
"""


def two_processes(screen, run, at_step_3="pass", in_validation="pass", silence=60.0, **values):
    """Both processes of a training, without torchrun, which would end the second when the first is gone."""
    settings = {**SMALL, "steps": 6, "checkpoint_every": 1, **values}
    code = textwrap.dedent(PROCESS).format(
        silence=silence, at_step_3=at_step_3, in_validation=in_validation, values=settings, screen=str(screen), run=str(run)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Forked(code, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, run.parent, f"process{rank}") for rank in range(2)
    ]


def ends_with_one_sentence(process, *words):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    told = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1, errors
    assert "Traceback" not in errors
    assert "terminate called" not in errors
    for word in ("has ended or answers no more", "--resume", *words):
        assert word in told[0]


@pytest.mark.parametrize("gone", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_a_process_dies_the_other_says_so_and_ends(screen, tmp_path, gone):
    die = f"rank == {gone} and os.kill(os.getpid(), signal.SIGKILL)"
    processes = two_processes(screen, tmp_path / "run", at_step_3=die)
    ends_with_one_sentence(processes[1 - gone])
    processes[gone].communicate()
    assert processes[gone].returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


@pytest.mark.slow
def test_a_stopped_process_is_reported_and_ends_by_itself_when_it_goes_on(screen, tmp_path):
    stop = "rank == 1 and os.kill(os.getpid(), signal.SIGSTOP)"
    first, second = two_processes(screen, tmp_path / "run", at_step_3=stop, silence=3.0)
    ends_with_one_sentence(first, "process 1 of this training")
    assert second.poll() is None
    second.send_signal(signal.SIGCONT)
    ends_with_one_sentence(second)


@pytest.mark.slow
def test_waiting_for_a_validation_longer_than_the_silence_is_no_alarm(screen, tmp_path):
    began = time.monotonic()
    processes = two_processes(screen, tmp_path / "run", in_validation="time.sleep(4)", silence=2.0, steps=2)
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "ended well" in output
    assert time.monotonic() - began > 4


def test_a_refusal_of_the_first_process_ends_all(screen, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for process in two_processes(screen, tmp_path / "run"):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "already holds a run (config.yaml)" in errors
        assert "Traceback" not in errors
