"""``cogview estimate``: memory and time in words and as JSON, nothing loaded."""

import json
import shutil

import pytest
import torch

from cogview.cli.main import main

SPEED = ("--bandwidth", "10", "--flops", "0.1")  # so that nothing is measured


def report(capsys, *arguments: str) -> dict:
    """What the command prints with --json."""
    assert main(["estimate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_preset_on_a_card_of_a_size(capsys):
    arguments = ["--model", "4b", "--task", "generate", "-n", "8", "--dtype", "int8", "--device", "cuda:24GB"]
    assert main(["estimate", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # nothing to measure
    lines = captured.out.splitlines()
    assert lines[0] == "4b: generate, 8 rows of up to 1,088 positions, int8, on cuda with 24.0 GB"
    parts = {line[2:22].strip(): line[24:32].strip() for line in lines if line.startswith("  ")}
    assert parts["KV cache"] == "4.3 GB"  # 491,520 bytes x 1,088 positions x 8
    assert parts["VQ-VAE"] == "92.9 MB"
    assert any(line.startswith("fits: 22.8 GB may be taken") for line in lines)
    assert any(line.startswith("time: about ") for line in lines)
    assert "  bandwidth: 900 GB/s (assumed)" in lines
    assert any(line.startswith("  int8 weights are unpacked") for line in lines)


def test_cuda_is_not_touched_for_a_size(capsys, monkeypatch):
    def touched(*_: object) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "mem_get_info", "get_device_capability", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert report(capsys, "--model", "5m", "--device", "cuda:24GB")["dtype"] == "bfloat16"
    assert report(capsys, "--model", "5m", "--device", "cpu:16GB")["dtype"] == "float32"
    assert report(capsys, "--model", "5m", "--device", "cpu", *SPEED)["device"]["type"] == "cpu"


def test_a_folder_without_its_weights_in_memory(tiny_checkpoint, capsys):
    found = report(capsys, "--model", str(tiny_checkpoint), "-n", "3", "--device", "cpu:16GB", "--task", "caption")
    assert (found["task"], found["rows"], found["dtype"]) == ("caption", 3, "float32")
    memory = found["memory"]
    assert memory["total"] == memory["constant"] + 3 * memory["per_row"]
    parts = ("layers", "embedding", "packed", "image_tokenizer", "workspace", "overhead")
    assert memory["constant"] == sum(memory.get(part, 0) for part in parts)
    assert found["fits"] is True
    assert found["seconds"]["total"] == pytest.approx(sum(found["seconds"][k] for k in ("given", "steps", "pictures")))


def test_what_is_packed_on_a_cpu_is_shown(tiny_checkpoint, capsys, monkeypatch):
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu:16GB"]
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    memory = report(capsys, *arguments)["memory"]
    assert memory["packed"] == 4 * 32 * (12 * 32 * 2 + 8192)  # the projections of two layers, and the codes
    main(["estimate", *arguments])
    assert "packed for MKL" in capsys.readouterr().out
    for other in (["--dtype", "bfloat16"], ["--device", "cuda:16GB"]):
        assert "packed" not in report(capsys, *arguments, *other)["memory"]
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    assert "packed" not in report(capsys, *arguments)["memory"]


def test_the_model_of_the_package_is_the_default(capsys):
    found = report(capsys, "--device", "cpu:1GB")
    assert (found["model"], found["task"], found["rows"]) == ("cogview-emoji", "generate", 1)


def test_rerank_is_another_name_of_score(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu:16GB")
    assert report(capsys, *arguments, "--task", "rerank") == report(capsys, *arguments, "--task", "score")
    main(["estimate", *arguments, "--task", "score"])
    out = capsys.readouterr().out
    assert "KV cache  " not in out  # nothing is kept
    assert "drawn positions" not in out


def test_guidance_doubles_the_rows(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu:16GB")
    plain, guided = report(capsys, *arguments), report(capsys, *arguments, "--guidance", "3")
    assert guided["memory"]["kv_cache"] == 2 * plain["memory"]["kv_cache"]
    assert report(capsys, *arguments, "--guidance", "1") == plain


def test_given_speed_takes_the_place_of_a_measured_one(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu")
    found = report(capsys, *arguments, *SPEED)["assumed"]
    assert found["bandwidth"] == {"value": 10e9, "is": "given"}
    assert found["flops"] == {"value": 0.1e12, "is": "given"}
    assert main(["estimate", *arguments, "--flops", "0.1"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("measuring cpu for a moment")
    assert "GB/s (measured)" in captured.out
    assert "flops: 0.1 TFLOP/s (given)" in captured.out


def test_a_large_model_on_a_cpu_is_taken_in_half_precision(capsys):
    assert report(capsys, "--model", "4b", "--device", "cpu:24GB")["dtype"] == "bfloat16"


def test_not_fitting_is_an_answer(capsys):
    found = report(capsys, "--model", "4b", "-n", "8", "--device", "cuda:6GB")
    assert found["fits"] is False
    assert found["largest_rows"] == 0
    assert [option.rpartition(" -n ")[0] for option in found["would_fit"]] == ["--dtype int8", "--dtype int4"]
    for option in found["would_fit"]:  # what is offered does fit, and one more would not
        arguments = ["--model", "4b", "--device", "cuda:6GB", *option.split()]
        tried = report(capsys, *arguments)
        assert tried["fits"] is True
        assert tried["largest_rows"] == tried["rows"]
    main(["estimate", "--model", "4b", "-n", "8", "--device", "cuda:6GB"])
    assert "does not fit: 5.7 GB may be taken" in capsys.readouterr().out


def test_fewer_rows_are_offered(capsys):
    found = report(capsys, "--model", "4b", "-n", "200", "--device", "cuda:24GB", "--dtype", "bfloat16")
    assert found["would_fit"][0] == f"-n {found['largest_rows']}"


def test_nothing_fits_a_small_device(capsys):
    assert main(["estimate", "--model", "4b", "--device", "cuda:100MB"]) == 0
    assert "what would: nothing smaller; one row takes " in capsys.readouterr().out


def test_mistakes_are_one_line(tiny_checkpoint, tmp_path, capsys):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (broken / "image" / "config.json").write_text("{")
    for arguments, message in [
        (["--model", "cogview-bse"], 'model "cogview-bse" is unknown; known: cogview-emoji, '),
        (["--model", str(broken)], f"{broken / 'image' / 'config.json'} is not JSON: "),
        (["--task", "draw"], "task 'draw' is unknown; known: generate, "),
        (["--dtype", "int7"], "dtype 'int7' is unknown; known: "),
        (["--device", "cuda:24TBX"], "device 'cuda:24TBX' is unknown; expected auto, cpu, cuda, cuda:N or mps, or a "),
        (["--device", "cuda:0GB"], "the size of the device must be above 0, got cuda:0GB"),
        (["-n", "0"], "-n must be at least 1, got 0"),
        (["--bandwidth", "-1"], "--bandwidth must be a number above 0, got -1"),
        (["--guidance", "nan"], "--guidance must be a number from 0 on (1: none), got nan"),
    ]:
        assert main(["estimate", "--device", "cpu:1GB", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"cogview estimate: {message}")
        assert err.count("\n") == 1


def test_help(capsys):
    assert main(["estimate", "--help"]) == 0
    assert "--bandwidth" in capsys.readouterr().out
