"""The note on a busy processor before a training."""

import pytest
import torch

from cogview.cli import processor


@pytest.mark.parametrize(
    ("load", "threads", "device", "is_noted"),
    [(4.2, 2, "cpu", True), (1.9, 2, "cpu", False), (4.2, 1, "cpu", False)],
)
def test_training_notes_a_busy_processor_once(monkeypatch, capsys, load, threads, device, is_noted):
    processor._note_once.cache_clear()
    monkeypatch.setattr(processor.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(processor.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(2):
        processor.note_busy_processor(device)
    err = capsys.readouterr().err
    assert err.count("OMP_NUM_THREADS=1") == err.count("(load 4.2, cores 2, threads 2)") == is_noted
    processor._note_once.cache_clear()
