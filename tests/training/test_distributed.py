"""Joining the processes that a launcher has started, and failing together (training together: ``test_processes``)."""

import math

import numpy as np
import pytest
import torch

from cogview.checkpoints.finite import NonFiniteWeightsError, require_finite
from cogview.errors import InputError, ReportedByPeer
from cogview.training import distributed
from cogview.training.distributed import DistributedContext, init_distributed, is_peer_failure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Remove the variables of a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_init_distributed_needs_no_group_for_one_process():
    context = init_distributed("cpu")
    assert (context.rank, context.size, context.device) == (0, 1, CPU)
    assert context.is_main_process
    assert context.all_reduce_sum(np.array([1.5, 2.0])).tolist() == [1.5, 2.0]
    assert context.all_reduce_max(3.0) == 3.0
    assert not context.all_reduce_any(False)
    assert context.run_on_main(lambda: "done") == context.run_everywhere(lambda: "done") == "done"
    assert context.local_slice(8) == slice(0, 8)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            'RANK "2" and WORLD_SIZE "2" must be whole numbers, RANK from 0 to WORLD_SIZE - 1',
        ),
        ({"RANK": "one", "WORLD_SIZE": "2"}, 'RANK "one" and WORLD_SIZE "2" must be whole numbers'),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, but MASTER_ADDR is not set; start with torchrun --nproc-per-no",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"},
            "MASTER_PORT is 'abc', expected a whole number; start with torchrun",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"},
            "MASTER_PORT is 65536, expected a port from 1 to 65535",
        ),
    ],
)
def test_init_distributed_refuses_contradicting_variables(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        init_distributed("cpu")


def test_init_distributed_refuses_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        init_distributed("auto")
    assert str(caught.value) == (
        "8 processes were started on this machine, which has 2 GPUs; expected one for each: torchrun --nproc-per-node 2"
    )
    with pytest.raises(
        InputError, match="so each takes the GPU of its LOCAL_RANK; expected --device auto, cpu or cuda, got"
    ):
        init_distributed("cuda:1")


def test_init_distributed_names_the_address_when_it_cannot_be_reached(monkeypatch):
    def refuse(*arguments, **settings):
        raise RuntimeError("The client socket has timed out\nand more")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        init_distributed("cpu")
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
        (1, [1, 1, 1], ReportedByPeer, "process 0 stopped"),
        (2, [0, 0, 1], InputError, "process 2 of 3: there is no store"),
    ],
)
def test_run_everywhere_reports_in_one_of_the_failed_processes(monkeypatch, rank, failed, error, message):
    monkeypatch.setattr(DistributedContext, "_gathered", lambda self, numbers: np.array(failed)[:, None])
    with pytest.raises(InputError) as caught:
        DistributedContext(CPU, rank, 3).run_everywhere(failing)
    assert type(caught.value) is error
    assert str(caught.value) == message


def test_run_everywhere_keeps_the_kind_of_the_error_of_a_later_process(monkeypatch):
    """Weights that are not finite were reported as those of another recipe where a later process had found them."""
    monkeypatch.setattr(DistributedContext, "_gathered", lambda self, numbers: np.array([[0], [1]]))
    with pytest.raises(NonFiniteWeightsError, match="process 1 of 2: "):
        DistributedContext(CPU, 1, 2).run_everywhere(lambda: require_finite("weights", torch.tensor([math.nan])))


def test_run_everywhere_stops_silently_when_a_peer_failed(monkeypatch):
    monkeypatch.setattr(DistributedContext, "_gathered", lambda self, numbers: np.array([[0], [1]]))
    with pytest.raises(ReportedByPeer):
        DistributedContext(CPU, 0, 2).run_everywhere(lambda: "done")


def test_is_peer_failure_knows_the_messages_of_gloo(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    assert is_peer_failure(
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29616.")
    )
    assert not is_peer_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    assert not is_peer_failure(RuntimeError("Connection closed by peer"))
