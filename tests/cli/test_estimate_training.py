"""``cogview estimate --train``: memory and time of training as text and as JSON, without loading weights."""

import json

import pytest
import torch

from cogview.cli.main import main

CARD = ("--model", "4b", "--device", "cuda:80GB")


def report(capsys, *arguments: str) -> dict:
    """Return the JSON object that the command prints."""
    assert main(["estimate", "--train", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_line(capsys, *arguments: str) -> str:
    """Return the line that the command prints for a mistake."""
    assert main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_size_table_lists_presets(capsys):
    assert main(["estimate", "--train"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["20m", "100m", "300m", "1b", "4b"]
    assert lines[0].split()[-6:] == ["1", "x", "H100", "8", "x", "H100"]
    assert "3,928,849,920" in lines[5]
    assert "144,000" in lines[5]
    assert "starting points, not measured" in captured.out
    table = report(capsys)
    assert [(size["size"], size["batch"]) for size in table["sizes"]][-1] == ("4b", 6144)
    slow = report(capsys, "--mfu", "0.2")
    for size, slower in zip(table["sizes"], slow["sizes"], strict=True):
        assert slower["times"][0]["seconds"] == pytest.approx(2 * size["times"][0]["seconds"])
    assert report(capsys, "--flops", "494.5")["flops"] == pytest.approx(table["flops"] / 2)


def test_training_estimate_describes_preset_on_eight_gpus(capsys):
    assert main(["estimate", "--train", *CARD, "--gpus", "8", "--zero", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == (
        "4b: training, 8 sequences of 1,089 positions at once, 6,144 per step, bfloat16, deepspeed ZeRO 2, "
        "checkpointing none, on 8 x cuda with 80.0 GB"
    )
    parts = {line[2:22].strip(): line[24:32].strip() for line in lines if line.startswith("  ")}
    assert parts["weights"] == "7.9 GB"
    assert parts["optimizer"] == "5.9 GB"
    assert any(line.startswith("fits: 76.0 GB are usable") for line in lines)
    assert any(line.startswith("time: about 2,059 h for 9.63e+11 positions in 144,000 steps") for line in lines)
    assert "  flops: 989 TFLOP/s (assumed: H100)" in lines
    assert "  mfu: 0.4 of flops (assumed)" in lines


def test_training_estimate_does_not_initialize_cuda_for_size(capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("CUDA was initialized")

    for name in ("is_available", "mem_get_info", "get_device_capability", "get_device_name", "init"):
        monkeypatch.setattr(torch.cuda, name, fail)
    assert report(capsys, *CARD)["job"]["precision"] == "bfloat16"
    assert report(capsys, "--model", "5m", "--device", "cpu:16GB")["job"]["precision"] == "float32"


def test_training_estimate_chooses_maximum_micro_batch(capsys):
    found = report(capsys, *CARD, "--gpus", "8", "--zero", "1", "--checkpointing", "selective")
    memory, job = found["memory"], found["job"]
    assert memory["total"] == sum(count for part, count in memory.items() if part not in ("host", "total"))
    assert found["fits"] is True
    assert (job["micro_batch_size"], job["checkpointing"]) == (found["max_micro_batch_size"], "selective")
    assert (found["parameters"], found["trained"]) == (3928849920, 3928849920)
    assert found["flops_per_token"] == pytest.approx(24.35e9, rel=1e-3)
    assert found["assumed"]["flops"] == {"value": 989e12, "is": "assumed: H100"}


def test_training_estimate_counts_host_memory_when_offloading(capsys):
    arguments = ("--model", "4b", "--device", "cuda:40GB", "--gpus", "8", "--offload")
    found = report(capsys, *arguments)
    assert (found["job"]["engine"], found["job"]["zero"], found["fits"]) == ("deepspeed", 2, True)
    assert found["memory"]["optimizer"] == 0
    assert found["memory"]["host"] == pytest.approx(18 * found["parameters"] / 8)
    main(["estimate", "--train", *arguments])
    line = next(line for line in capsys.readouterr().out.splitlines() if "on the host" in line)
    assert line.split()[3:5] == ["8.8", "GB"]
    assert line.endswith("18 bytes x 3,928,849,920 parameters / 8 GPUs; for each GPU of a host")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "cuda:40GB", "--gpus", "8"),
        ("--device", "cuda:80GB", "--gpus", "8", "--micro-batch-size", "24", "--checkpointing", "none", "--zero", "1"),
        ("--device", "cuda:24GB"),
        ("--device", "cuda:24GB", "--offload", "--zero", "1"),
    ],
)
def test_training_suggestions_fit_when_job_does_not(capsys, arguments):
    found = report(capsys, "--model", "4b", *arguments)
    assert found["fits"] is False
    assert found["suggestions"]
    for option in found["suggestions"]:
        kept = [*arguments]
        for new in [word for word in option.split() if word.startswith("--") and word in kept]:
            del kept[kept.index(new) : kept.index(new) + 1 + (new != "--offload")]
        for flag, key in (("--micro-batch-size", "micro_batch_size"), ("--checkpointing", "checkpointing")):
            if flag not in (*kept, *option.split()):
                kept += [flag, str(found["job"][key])]
        assert report(capsys, "--model", "4b", *kept, *option.split())["fits"] is True, option
    main(["estimate", "--train", "--model", "4b", *arguments])
    assert "does not fit: " in capsys.readouterr().out


def test_training_estimate_has_no_suggestion_for_tiny_gpu(capsys):
    assert main(["estimate", "--train", "--model", "4b", "--device", "cuda:1GB"]) == 0
    assert "options that fit: none; use larger devices, or more of them" in capsys.readouterr().out


def test_training_estimate_counts_adapter_parameters(capsys):
    found = report(capsys, "--model", "1b", "--device", "cuda:12GB", "--lora", "8")
    assert found["trained"] == 8 * 24 * 16 * 1792
    assert found["fits"] is True
    main(["estimate", "--train", "--model", "1b", "--device", "cuda:12GB", "--lora", "8"])
    assert "training, an adapter of rank 8, " in capsys.readouterr().out


def test_training_estimate_scales_with_options_for_checkpoint_folder(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu", "--flops", "0.1", "--precision", "float32")
    found = report(capsys, *arguments)
    assert (found["job"]["batch_size"], found["job"]["device_type"]) == (32, "cpu")
    assert found["tokens"] == 20 * found["parameters"]
    assert found["assumed"]["flops"] == {"value": 0.1e12, "is": "given"}
    longer = report(capsys, *arguments, "--tokens", "1e9", "--batch", "64", "--length", "20")
    assert longer["steps"] == round(1e9 / (64 * 20))
    assert longer["seconds"] > found["seconds"]


def test_training_estimate_measures_cpu_when_flops_are_not_given(tiny_checkpoint, capsys):
    assert main(["estimate", "--train", "--model", str(tiny_checkpoint), "--device", "cpu", "--mfu", "0.5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "measuring cpu briefly; --flops avoids it\n"
    assert "TFLOP/s (measured)" in captured.out
    assert "mfu: 0.5 of flops (given)" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "--model", "7b"), 'model "7b" is unknown'),
        (("--train", *CARD, "--zero", "4"), "invalid value for '--zero': 4 is not in the range 0<=x<=3"),
        (("--train", *CARD, "--zero", "2", "--engine", "torch"), "ZeRO stage 2 needs the engine deepspeed, got torch"),
        (
            ("--train", *CARD, "--engine", "fsdp"),
            "invalid value for '--engine': 'fsdp' is not one of ",
        ),
        (("--train", *CARD, "--offload", "--engine", "torch"), "offloading the optimizer needs the engine deepspeed"),
        (("--train", *CARD, "--gpus", "7"), "--batch-size 6144 does not divide among 7 GPUs"),
        (
            ("--train", *CARD, "--gpus", "8", "--rows", "5"),
            "--micro-batch-size 5 does not divide the 768 rows of each of 8 GPUs, in a batch of 6144",
        ),
        (
            ("--train", *CARD, "--rows", "0"),
            "invalid value for '--micro-batch-size' / '--rows': 0 is not in",
        ),
        (("--train", *CARD, "--lora", "0"), "invalid value for '--lora': 0 is not in the range x>=1"),
        (("--train", *CARD, "--tokens", "nan"), "invalid value for '--tokens': nan is not a finite number"),
        (("--train", *CARD, "--mfu", "40"), "invalid value for '--mfu': 40.0 is not in the range 0<x<=1"),
        (("--train", *CARD, "--precision", "int8"), "invalid value for '--precision': 'int8' is not one of "),
        (("--train", *CARD, "--checkpointing", "all"), "invalid value for '--checkpointing': 'all' is not one of "),
        (("--train", *CARD, "--flops", "0"), "invalid value for '--flops': 0.0 is not in the range x>0"),
        (("--train", "--model", "4b", "--device", "cuda:0GB"), "the size of the device must be above 0"),
        (("--train", *CARD, "-n", "2"), "-n does not go with --train"),
        (("--train", *CARD, "--task", "caption"), "--task does not go with --train"),
        (("--train", *CARD, "--dtype", "int8"), "--dtype does not go with --train"),
        (("--train", *CARD, "--bandwidth", "3"), "--bandwidth does not go with --train"),
        (("--train", "--gpus", "8"), "--gpus is about one model: name it with --model, such as --model 4b"),
        (("--train", "--device", "cuda:80GB"), "--device is about one model"),
        (("--gpus", "8"), "--gpus needs --train"),
        (("--model", "4b", "--offload"), "--offload needs --train"),
        (("--model", "4b", "--mfu", "0.5"), "--mfu needs --train"),
    ],
)
def test_training_estimate_reports_mistake_in_one_line(arguments, message, capsys):
    assert message in error_line(capsys, *arguments)
