"""``cogview estimate --train``: memory and time of training in words and as JSON, nothing loaded."""

import json

import pytest
import torch

from cogview.cli.main import main

CARD = ("--model", "4b", "--device", "cuda:80GB")


def report(capsys, *arguments: str) -> dict:
    """What the command prints with --json."""
    assert main(["estimate", "--train", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    """The one line that the command prints where it is asked for what cannot be."""
    assert main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_table_of_sizes(capsys):
    assert main(["estimate", "--train"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["20m", "100m", "300m", "1b", "4b"]
    assert lines[0].split()[-6:] == ["1", "x", "H100", "8", "x", "H100"]
    assert "3,928,849,920" in lines[5]
    assert "144,000" in lines[5]
    assert "starting points and not measured" in captured.out
    table = report(capsys)
    assert [(size["size"], size["batch"]) for size in table["sizes"]][-1] == ("4b", 6144)
    slow = report(capsys, "--mfu", "0.2")
    for size, slower in zip(table["sizes"], slow["sizes"], strict=True):
        assert slower["times"][0]["seconds"] == pytest.approx(2 * size["times"][0]["seconds"])
    assert report(capsys, "--flops", "494.5")["flops"] == pytest.approx(table["flops"] / 2)


def test_a_size_on_eight_cards(capsys):
    assert main(["estimate", "--train", *CARD, "--gpus", "8", "--zero", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == (
        "4b: training, 8 rows of 1,089 positions at once, 6,144 rows a step, bfloat16, deepspeed ZeRO 2, checkpointing "
        "none, on 8 x cuda with 80.0 GB"
    )
    parts = {line[2:22].strip(): line[24:32].strip() for line in lines if line.startswith("  ")}
    assert parts["weights"] == "7.9 GB"
    assert parts["optimizer"] == "5.9 GB"
    assert any(line.startswith("fits: 76.0 GB may be taken") for line in lines)
    assert any(line.startswith("time: about 2,059 h for 9.63e+11 positions in 144,000 steps") for line in lines)
    assert "  flops: 989 TFLOP/s (assumed: H100)" in lines
    assert "  mfu: 0.4 of these (assumed)" in lines


def test_cuda_is_not_touched_for_a_size(capsys, monkeypatch):
    def touched(*_: object) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "mem_get_info", "get_device_capability", "get_device_name", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert report(capsys, *CARD)["job"]["precision"] == "bfloat16"
    assert report(capsys, "--model", "5m", "--device", "cpu:16GB")["job"]["precision"] == "float32"


def test_parts_add_up_and_rows_are_the_most_that_fit(capsys):
    found = report(capsys, *CARD, "--gpus", "8", "--zero", "1", "--checkpointing", "selective")
    memory, job = found["memory"], found["job"]
    assert memory["total"] == sum(count for part, count in memory.items() if part not in ("host", "total"))
    assert found["fits"] is True
    assert (job["micro_batch_size"], job["checkpointing"]) == (found["largest_rows"], "selective")
    assert (found["parameters"], found["trained"]) == (3928849920, 3928849920)
    assert found["flops_per_token"] == pytest.approx(24.35e9, rel=1e-3)
    assert found["assumed"]["flops"] == {"value": 989e12, "is": "assumed: H100"}


def test_offload_counts_the_host(capsys):
    arguments = ("--model", "4b", "--device", "cuda:40GB", "--gpus", "8", "--offload")
    found = report(capsys, *arguments)
    assert (found["job"]["engine"], found["job"]["zero"], found["fits"]) == ("deepspeed", 2, True)
    assert found["memory"]["optimizer"] == 0
    assert found["memory"]["host"] == pytest.approx(18 * found["parameters"] / 8)
    main(["estimate", "--train", *arguments])
    line = next(line for line in capsys.readouterr().out.splitlines() if "on the host" in line)
    assert line.split()[3:5] == ["8.8", "GB"]
    assert line.endswith("18 bytes x 3,928,849,920 parameters / 8 GPUs; as often as a host has GPUs")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "cuda:40GB", "--gpus", "8"),
        ("--device", "cuda:80GB", "--gpus", "8", "--rows", "24", "--checkpointing", "none", "--zero", "1"),
        ("--device", "cuda:24GB"),
        ("--device", "cuda:24GB", "--offload", "--zero", "1"),
    ],
)
def test_not_fitting_is_an_answer_and_what_is_offered_fits(capsys, arguments):
    found = report(capsys, "--model", "4b", *arguments)
    assert found["fits"] is False
    assert found["would_fit"]
    for option in found["would_fit"]:
        kept = [*arguments]
        for new in [word for word in option.split() if word.startswith("--") and word in kept]:
            del kept[kept.index(new) : kept.index(new) + 1 + (new != "--offload")]
        rows = () if "--rows" in (*kept, *option.split()) else ("--rows", str(found["job"]["micro_batch_size"]))
        mode = (
            () if "--checkpointing" in (*kept, *option.split()) else ("--checkpointing", found["job"]["checkpointing"])
        )
        assert report(capsys, "--model", "4b", *kept, *rows, *mode, *option.split())["fits"] is True, option
    main(["estimate", "--train", "--model", "4b", *arguments])
    assert "does not fit: " in capsys.readouterr().out


def test_nothing_fits_on_a_tiny_card(capsys):
    assert main(["estimate", "--train", "--model", "4b", "--device", "cuda:1GB"]) == 0
    assert "what would: nothing here; larger devices, or more of them" in capsys.readouterr().out


def test_an_adapter(capsys):
    found = report(capsys, "--model", "1b", "--device", "cuda:12GB", "--lora", "8")
    assert found["trained"] == 8 * 24 * 16 * 1792
    assert found["fits"] is True
    main(["estimate", "--train", "--model", "1b", "--device", "cuda:12GB", "--lora", "8"])
    assert "training, an adapter of rank 8, " in capsys.readouterr().out


def test_a_folder_on_a_processor_that_is_here(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu", "--flops", "0.1", "--precision", "float32")
    found = report(capsys, *arguments)
    assert (found["job"]["batch_size"], found["job"]["device_type"]) == (32, "cpu")
    assert found["tokens"] == 20 * found["parameters"]
    assert found["assumed"]["flops"] == {"value": 0.1e12, "is": "given"}
    longer = report(capsys, *arguments, "--tokens", "1e9", "--batch", "64", "--length", "20")
    assert longer["steps"] == round(1e9 / (64 * 20))
    assert longer["seconds"] > found["seconds"]


def test_the_processor_is_measured_where_nothing_is_given(tiny_checkpoint, capsys):
    assert main(["estimate", "--train", "--model", str(tiny_checkpoint), "--device", "cpu", "--mfu", "0.5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "measuring cpu for a moment; --flops spares that\n"
    assert "TFLOP/s (measured)" in captured.out
    assert "mfu: 0.5 of these (given)" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "--model", "7b"), 'model "7b" is unknown'),
        (("--train", *CARD, "--zero", "4"), "--zero must be 0, 1, 2 or 3, got 4"),
        (("--train", *CARD, "--zero", "2", "--engine", "torch"), "ZeRO stage 2 needs the engine deepspeed, got torch"),
        (("--train", *CARD, "--engine", "fsdp"), "engine 'fsdp' is unknown; known: torch, deepspeed"),
        (("--train", *CARD, "--offload", "--engine", "torch"), "offloading the optimizer needs the engine deepspeed"),
        (("--train", *CARD, "--gpus", "7"), "--batch 6144 does not divide among 7 GPUs"),
        (
            ("--train", *CARD, "--gpus", "8", "--rows", "5"),
            "--rows 5 does not divide the 768 rows of each of 8 GPUs, in a batch of 6144",
        ),
        (("--train", *CARD, "--rows", "0"), "--rows must be at least 1, got 0"),
        (("--train", *CARD, "--lora", "0"), "--lora must be at least 1, got 0"),
        (("--train", *CARD, "--tokens", "nan"), "--tokens must be at least 1, got nan"),
        (("--train", *CARD, "--mfu", "40"), "--mfu must be above 0 and at most 1, got 40"),
        (("--train", *CARD, "--precision", "int8"), "precision 'int8' is unknown"),
        (("--train", *CARD, "--checkpointing", "all"), "checkpointing 'all' is unknown"),
        (("--train", *CARD, "--flops", "0"), "--flops must be a number above 0, got 0"),
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
def test_mistakes_are_one_line(arguments, message, capsys):
    assert message in refused(capsys, *arguments)
