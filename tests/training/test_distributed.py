"""Taking one's place among several processes, by what their launcher says (test_processes: what they do together)."""

import numpy as np
import pytest
import torch

from cogview.errors import InputError, ToldElsewhere
from cogview.training import distributed
from cogview.training.distributed import World, join_world, lost_another

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As if no launcher had started this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_needs_no_group():
    world = join_world("cpu")
    assert (world.rank, world.size, world.device) == (0, 1, CPU)
    assert world.is_first
    assert world.sum(np.array([1.5, 2.0])).tolist() == [1.5, 2.0]
    assert world.max(3.0) == 3.0
    assert not world.any(False)
    assert world.on_first(lambda: "done") == world.together(lambda: "done") == "done"
    assert world.share(8) == slice(0, 8)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "RANK is 2 and WORLD_SIZE 2: expected a rank from 0 to 1; start with torchrun",
        ),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', expected a whole number; start with torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, but MASTER_ADDR is not set; start with torchrun --nproc-per-no",
        ),
    ],
)
def test_variables_that_do_not_fit(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        join_world("cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        join_world("auto")
    assert str(caught.value) == (
        "8 processes were started on this machine, which has 2 GPUs; expected one for each: torchrun --nproc-per-node 2"
    )
    with pytest.raises(
        InputError, match="so each takes the GPU of its LOCAL_RANK; expected --device auto, cpu or cuda, got"
    ):
        join_world("cuda:1")


def test_a_group_that_cannot_be_reached_names_the_address(monkeypatch):
    def refuse(*arguments, **settings):
        raise RuntimeError("The client socket has timed out\nand more")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        join_world("cpu")
    assert str(caught.value) == (
        "process 1 of 2 cannot reach the others at 10.0.0.9:29500: The client socket has timed out; is the port open, "
        "and is it the first node's address?"
    )


def failing() -> None:
    raise InputError("there is no store")


@pytest.mark.parametrize(
    ("rank", "failed", "error", "message"),
    [
        (0, [1, 1, 1], InputError, "there is no store"),
        (1, [1, 1, 1], ToldElsewhere, "process 0 stopped"),
        (2, [0, 0, 1], InputError, "process 2 of 3: there is no store"),
    ],
)
def test_of_processes_that_fail_one_tells(monkeypatch, rank, failed, error, message):
    monkeypatch.setattr(World, "_gathered", lambda self, numbers: np.array(failed)[:, None])
    with pytest.raises(InputError) as caught:
        World(CPU, rank, 3).together(failing)
    assert type(caught.value) is error
    assert str(caught.value) == message


def test_one_that_did_not_fail_stops_in_silence(monkeypatch):
    monkeypatch.setattr(World, "_gathered", lambda self, numbers: np.array([[0], [1]]))
    with pytest.raises(ToldElsewhere):
        World(CPU, 0, 2).together(lambda: "done")


def test_what_says_that_another_process_is_gone(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    assert lost_another(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29616."))
    assert not lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    assert not lost_another(RuntimeError("Connection closed by peer"))
