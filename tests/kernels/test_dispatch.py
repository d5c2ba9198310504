"""Dispatch: which implementation runs, and what the log says."""

import logging

import pytest
import torch

from cogview.kernels.attention import attention
from cogview.kernels.dispatch import ForcedKernelsError, select_backend
from tests.factories import random_transformer


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Clear the cached choice of implementation before and after."""
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    select_backend.cache_clear()
    yield
    select_backend.cache_clear()


@pytest.mark.parametrize(
    ("forced", "known", "usual", "chosen", "logged"),
    [
        (None, ("reference", "torch", "triton"), None, "torch", "sums on cuda: torch"),
        (None, ("reference", "triton"), None, "reference", "sums on cuda: reference"),
        (None, ("reference", "torch"), "reference", "reference", "sums on cuda: reference"),
        ("reference", ("reference", "torch"), None, "reference", "sums on cuda: reference (forced)"),
        ("torch", ("reference", "torch"), "reference", "torch", "sums on cuda: torch (forced)"),
        ("torch", ("reference", "triton"), None, "reference", "sums on cuda: reference (there is no torch)"),
    ],
)
def test_select_backend_can_be_forced_and_logs_once(monkeypatch, caplog, forced, known, usual, chosen, logged):
    if forced is not None:
        monkeypatch.setenv("COGVIEW_KERNELS", forced)
    with caplog.at_level(logging.INFO):
        assert select_backend("sums", "cuda", known, usual) == chosen
        assert select_backend("sums", "cuda", known, usual) == chosen
    assert [record.getMessage() for record in caplog.records] == [logged]


def test_select_backend_returns_triton_where_it_can_run(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("COGVIEW_KERNELS", "triton")
    assert select_backend("sums", "cuda") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_backend("sums", "cpu") == "triton"
    select_backend.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="COGVIEW_KERNELS=triton needs a GPU; TRITON_INTERPRET=1 interprets"):
        select_backend("sums", "cpu")


def test_select_backend_names_triton_when_it_is_missing(monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", "triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="COGVIEW_KERNELS=triton, but triton is not installed: pip install triton"):
        select_backend("sums", "cuda")


def test_select_backend_raises_when_the_name_is_unknown(monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", "fastest")
    with pytest.raises(ValueError, match="COGVIEW_KERNELS='fastest' is unknown; known: reference, torch, triton"):
        attention(*torch.zeros(3, 1, 1, 3, 16))


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_attention_runs_the_selected_backend(monkeypatch, name):
    if name == "triton":
        pytest.importorskip("triton")
        from cogview.kernels import attention_triton as module

        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        from cogview.kernels import attention as module
    monkeypatch.setenv("COGVIEW_KERNELS", name)
    called = []
    monkeypatch.setattr(module, f"attention_{name}", lambda *inputs, **settings: called.append(inputs))
    attention(*torch.zeros(3, 1, 1, 40, 16))
    assert len(called) == 1


def test_attention_uses_the_decoding_kernel_when_queries_are_few(monkeypatch):
    pytest.importorskip("triton")
    from cogview.kernels import decode_attention_triton as module

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("COGVIEW_KERNELS", "triton")
    called = []
    monkeypatch.setattr(module, "decode_attention_triton", lambda *inputs: called.append(inputs))
    attention(torch.zeros(1, 1, 1, 16), *torch.zeros(2, 1, 1, 3, 16))
    assert len(called) == 1


@pytest.mark.parametrize(("forced", "message"), [("fastest", "'fastest' is unknown"), ("triton", "needs a GPU")])
def test_prepare_cpu_refuses_forced_kernels_that_cannot_run(monkeypatch, forced, message):
    monkeypatch.setenv("COGVIEW_KERNELS", forced)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ForcedKernelsError, match=message):
        random_transformer().prepare_cpu()
