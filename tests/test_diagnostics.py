"""Checks of a machine: findings with a status, a text and a remedy."""

import importlib.metadata
import importlib.util
import math
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cogview
from cogview.diagnostics import machine as diagnostics
from cogview.diagnostics import recipe as recipe_checks
from cogview.diagnostics.machine import (
    Diagnosis,
    SupportedVersions,
    check_devices,
    check_disk,
    check_kernels,
    check_package,
    check_processes,
    check_versions,
    guarded,
    time_all_reduce,
)
from cogview.diagnostics.recipe import check_data_wait, check_memory, examine
from cogview.errors import InputError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def installed(monkeypatch):
    """A function that sets the installed version of every package; None for missing ones."""

    def install(version: str | None) -> None:
        def find(name: str) -> str:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", find)

    return install


def test_diagnosis_is_line_with_remedy():
    assert str(Diagnosis("ok", "torch", "2.9")) == "ok       torch         2.9"
    assert str(Diagnosis("problem", "disk", "full", "free some space")) == (
        "problem  disk          full; free some space"
    )


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.5.1", "problem"), ("2.6.0+cu124", "ok"), ("2.13.9", "ok"), ("2.14.0", "problem"), ("2.14.0a0+git", "problem")],
)
def test_check_package_compares_version_with_tested_ones(installed, version, status):
    installed(version)
    found = check_package("torch", SupportedVersions("", (2, 6), (2, 14)), is_needed=False)
    assert (found.status, found.text) == (status, version)
    assert found.remedy == ("" if status == "ok" else "tested with 2.6 to below 2.14: pip install 'cogview'")


@pytest.mark.parametrize(
    ("name", "extra", "is_needed", "status", "remedy"),
    [
        ("lmdb", "", False, "problem", "pip install lmdb"),
        ("triton", "", False, "note", "pip install triton"),
        ("peft", "lora", False, "note", "pip install 'cogview[lora]'"),
        ("peft", "lora", True, "problem", "pip install 'cogview[lora]'"),
    ],
)
def test_check_package_judges_missing_package_by_need(installed, name, extra, is_needed, status, remedy):
    installed(None)
    found = check_package(name, SupportedVersions(extra), is_needed=is_needed)
    assert (found.status, found.remedy) == (status, remedy)


def test_check_versions_passes_needed_packages(installed):
    installed(None)
    found = {finding.subject: finding.status for finding in check_versions({"deepspeed"})}
    assert (found["cogview"], found["deepspeed"], found["peft"]) == ("ok", "problem", "note")


def test_check_versions_names_the_folder_of_the_package():
    """It used to name the folder of its own module, cogview/diagnostics."""
    first = next(check_versions())
    assert f" in {Path(cogview.__file__).parent}, Python " in first.text


@pytest.mark.parametrize("device", ["tpu", "cuda:x"])
def test_examine_raises_input_error_for_an_unknown_device(monkeypatch, device):
    """Without a recipe the device used to be ignored."""
    monkeypatch.setattr(recipe_checks, "check_processes", lambda device, count: iter(()))
    with pytest.raises(InputError, match=f"device '{device}' is unknown; expected auto, cpu"):
        list(examine(None, device, None))


def test_examine_stops_after_versions_when_torch_is_missing(installed, monkeypatch):
    installed(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = list(examine(None, "cpu", None))
    assert found[-1].subject == list(diagnostics.PACKAGES)[-1]
    assert Diagnosis("problem", "torch", "is not installed", "pip install torch") in found


@pytest.mark.parametrize(("driver", "status"), [(None, "note"), ("/usr/bin/nvidia-smi", "problem")])
def test_check_devices_reports_driver_without_cuda_build(monkeypatch, driver, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    cpu, gpu = check_devices()
    assert (cpu.status, cpu.subject) == ("ok", "cpu")
    assert (gpu.status, gpu.subject) == (status, "gpu")
    assert bool(gpu.remedy) == (status == "problem")


def test_check_devices_names_the_quota_of_a_container(monkeypatch):
    monkeypatch.setattr("cogview.device.cpu_quota", lambda: 1.5)
    assert " processors, a quota of 1.5 processors, " in next(check_devices()).text


@pytest.mark.parametrize(("free", "status"), [(9e9, "ok"), (7e9, "note")])
def test_check_devices_notes_busy_gpu(monkeypatch, free, status):
    properties = namedtuple("Properties", "name major minor")("Card", 7, 5)
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_properties", properties),
        ("get_device_capability", (7, 5)),
        ("mem_get_info", (free, 10e9)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    _, gpu = check_devices()
    assert (gpu.status, gpu.subject) == (status, "cuda:0")
    assert "compute capability 7.5" in gpu.text
    assert gpu.text.endswith("trains in float16 with loss scaling and PB-relax, since it has no bfloat16")


def test_check_kernels_reports_forced_kernels_and_a_missing_compiler(monkeypatch):
    def found(**variables):
        for name in ("COGVIEW_KERNELS", "CC"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (finding,) = check_kernels()
        return finding.status, finding.text

    assert found(COGVIEW_KERNELS="nonsense")[0] == "problem"
    assert found(COGVIEW_KERNELS="torch") == ("note", "COGVIEW_KERNELS=torch")
    assert found(CC=sys.executable) == ("ok", f"those of a CPU are compiled at first use by {sys.executable}")
    level, text = found(CC="nonsense")
    assert level == "note"
    assert "CC is 'nonsense', which names no program" in text
    assert found(CC="nonsense", COGVIEW_KERNELS="native")[0] == "problem"


def test_check_disk_compares_free_bytes_with_checkpoints(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100e9, 50e9, 50e9))
    (fits,) = check_disk(tmp_path / "new" / "run", 10_000_000_000, kept=3)
    assert (fits.status, fits.remedy) == ("ok", "")
    assert fits.text.startswith(f"50.0 GB free at {tmp_path}, 3 checkpoints, ")
    (full,) = check_disk(tmp_path, 10_000_000_001, kept=3)
    assert (full.status, full.remedy) == ("problem", "free some space, or set a smaller run.keep")


def test_check_disk_reports_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(diagnostics.os, "access", lambda path, mode: False)
    *_, found = check_disk(tmp_path)
    assert (found.status, found.text) == ("problem", f"{tmp_path} cannot be written")


def test_guarded_turns_expected_errors_into_findings():
    def fail():
        yield Diagnosis("ok", "stores", "40 rows")
        raise InputError("there is\nno store")

    assert list(guarded("training", fail)) == [
        Diagnosis("ok", "stores", "40 rows"),
        Diagnosis("problem", "training", "there is no store"),
    ]


@pytest.mark.parametrize(
    ("predicted", "peak", "device_type", "status"),
    [(100, 110, "cuda", "ok"), (130, 100, "cuda", "note"), (100, 0, "cuda", "note"), (100, 500, "cpu", "ok")],
)
def test_check_memory_tolerates_20_percent_on_gpu(predicted, peak, device_type, status):
    found = check_memory(predicted, peak, device_type)
    assert found.status == status
    assert bool(found.remedy) == (status == "note")


def test_check_data_wait_suggests_workers_above_1_percent():
    assert check_data_wait(0.01).status == "ok"
    found = check_data_wait(0.02)
    assert (found.status, found.text) == ("note", "waiting for rows takes 2.0% of a step")
    assert "num_workers" in found.remedy


def test_check_processes_reports_wrong_sums(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(diagnostics, "_all_reduce_in_subprocesses", lambda size, uses_cuda: math.nan)
    (found,) = check_processes("cpu", 3)
    assert (found.status, found.text) == (
        "problem",
        "an all-reduce over 3 processes on this machine returned wrong sums",
    )


def test_check_processes_reports_failure_of_subprocess(monkeypatch):
    def fail(size, uses_cuda):
        raise RuntimeError("\n-- Process 1 terminated\nconnection refused")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(diagnostics, "_all_reduce_in_subprocesses", fail)
    (found,) = check_processes("cpu", None)
    assert found.status == "problem"
    assert found.text == "an all-reduce over 2 processes on this machine failed: connection refused"
    assert "NCCL_DEBUG=INFO" in found.remedy


@pytest.mark.parametrize(("added", "is_correct"), [(2.0, True), (3.0, False)])
def test_time_all_reduce_returns_nan_for_wrong_sums(monkeypatch, added, is_correct):
    """Rank 0 of two processes holds 1; the other holds 2."""
    monkeypatch.setattr(dist, "all_reduce", lambda numbers: numbers.add_(added))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    seconds = time_all_reduce(torch.device("cpu"), 0, 2)
    assert math.isnan(seconds) != is_correct
