"""``cogview estimate``: memory and time of inference as text and as JSON, without loading weights."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from cogview.cli.main import main

SPEED = ("--bandwidth", "10", "--flops", "0.1")  # avoid a measurement


def report(capsys, *arguments: str) -> dict:
    """Return the JSON object that the command prints."""
    assert main(["estimate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_estimate_describes_preset_on_gpu_size(capsys):
    arguments = ["--model", "4b", "--task", "generate", "-n", "8", "--dtype", "int8", "--device", "cuda:24GB"]
    assert main(["estimate", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == "4b: generate, 8 sequences of up to 1,088 positions, int8, on cuda with 24.0 GB"
    parts = {line[2:22].strip(): line[24:32].strip() for line in lines if line.startswith("  ")}
    assert parts["KV cache"] == "4.3 GB"  # 491,520 bytes x 1,088 positions x 8
    assert parts["VQ-VAE"] == "92.9 MB"
    assert any(line.startswith("fits: 22.8 GB are usable; 5% of 24.0 GB stays free; maximum -n: ") for line in lines)
    assert any(line.startswith("time: about ") for line in lines)
    assert "  bandwidth: 900 GB/s (assumed)" in lines
    assert any(line.startswith("  int8 weights are converted in ") for line in lines)


def test_estimate_does_not_initialize_cuda_for_size(capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("CUDA was initialized")

    for name in ("is_available", "mem_get_info", "get_device_capability", "init"):
        monkeypatch.setattr(torch.cuda, name, fail)
    assert report(capsys, "--model", "5m", "--device", "cuda:24GB")["dtype"] == "bfloat16"
    assert report(capsys, "--model", "5m", "--device", "cpu:16GB")["dtype"] == "float32"
    assert report(capsys, "--model", "5m", "--device", "cpu", *SPEED)["device"]["type"] == "cpu"


def test_estimate_memory_parts_add_up_for_checkpoint_folder(tiny_checkpoint, capsys):
    found = report(capsys, "--model", str(tiny_checkpoint), "-n", "3", "--device", "cpu:16GB", "--task", "caption")
    assert (found["task"], found["rows"], found["dtype"]) == ("caption", 3, "float32")
    memory = found["memory"]
    assert memory["total"] == memory["constant"] + 3 * memory["per_row"]
    parts = ("layers", "embedding", "prepacked", "image_tokenizer", "workspace", "overhead")
    assert memory["constant"] == sum(memory.get(part, 0) for part in parts)
    assert found["fits"] is True
    assert found["seconds"]["total"] == pytest.approx(
        sum(found["seconds"][k] for k in ("prefill", "decoding", "images"))
    )


def test_estimate_counts_weights_packed_for_mkl_on_cpu(tiny_checkpoint, capsys, monkeypatch):
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu:16GB"]
    monkeypatch.setenv("COGVIEW_KERNELS", "torch")  # native kernels pack nothing
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    memory = report(capsys, *arguments)["memory"]
    assert memory["prepacked"] == 4 * 32 * (12 * 32 * 2 + 8192)  # the projections of two layers, and the codes
    main(["estimate", *arguments])
    assert "packed for MKL" in capsys.readouterr().out
    for other in (["--dtype", "bfloat16"], ["--device", "cuda:16GB"]):
        assert "prepacked" not in report(capsys, *arguments, *other)["memory"]
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    assert "prepacked" not in report(capsys, *arguments)["memory"]


def test_estimate_uses_packaged_model_by_default(capsys):
    found = report(capsys, "--device", "cpu:1GB")
    assert (found["model"], found["task"], found["rows"]) == ("cogview-emoji", "generate", 1)


def test_estimate_accepts_rerank_as_name_of_score(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu:16GB")
    assert report(capsys, *arguments, "--task", "rerank") == report(capsys, *arguments, "--task", "score")
    main(["estimate", *arguments, "--task", "score"])
    out = capsys.readouterr().out
    assert "KV cache  " not in out
    assert "decoding  " not in out


def test_guidance_doubles_kv_cache(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu:16GB")
    plain, guided = report(capsys, *arguments), report(capsys, *arguments, "--guidance", "3")
    assert guided["memory"]["kv_cache"] == 2 * plain["memory"]["kv_cache"]
    assert report(capsys, *arguments, "--guidance", "1") == plain


def test_estimate_measures_only_rates_that_are_not_given(tiny_checkpoint, capsys):
    arguments = ("--model", str(tiny_checkpoint), "--device", "cpu")
    found = report(capsys, *arguments, *SPEED)["assumed"]
    assert found["bandwidth"] == {"value": 10e9, "is": "given"}
    assert found["flops"] == {"value": 0.1e12, "is": "given"}
    assert main(["estimate", *arguments, "--flops", "0.1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "measuring cpu briefly; --bandwidth and --flops avoid it\n"
    assert "GB/s (measured)" in captured.out
    assert "flops: 0.1 TFLOP/s (given)" in captured.out


def test_estimate_chooses_bfloat16_for_large_model_on_cpu(capsys):
    assert report(capsys, "--model", "4b", "--device", "cpu:24GB")["dtype"] == "bfloat16"


def test_suggestions_fit_when_job_does_not(capsys):
    found = report(capsys, "--model", "4b", "-n", "8", "--device", "cuda:6GB")
    assert found["fits"] is False
    assert found["max_rows"] == 0
    assert [option.rpartition(" -n ")[0] for option in found["suggestions"]] == ["--dtype int8", "--dtype int4"]
    for option in found["suggestions"]:  # each suggestion fits, with the maximum of sequences
        arguments = ["--model", "4b", "--device", "cuda:6GB", *option.split()]
        tried = report(capsys, *arguments)
        assert tried["fits"] is True
        assert tried["max_rows"] == tried["rows"]
    main(["estimate", "--model", "4b", "-n", "8", "--device", "cuda:6GB"])
    assert "does not fit: 5.7 GB are usable" in capsys.readouterr().out


def test_suggestions_begin_with_fewer_sequences(capsys):
    found = report(capsys, "--model", "4b", "-n", "200", "--device", "cuda:24GB", "--dtype", "bfloat16")
    assert found["suggestions"][0] == f"-n {found['max_rows']}"


def test_estimate_reports_bytes_of_one_sequence_when_nothing_fits(capsys):
    assert main(["estimate", "--model", "4b", "--device", "cuda:100MB"]) == 0
    assert "options that fit: none; one sequence takes " in capsys.readouterr().out


def test_estimate_reports_mistake_in_one_line(tiny_checkpoint, tmp_path, capsys):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (broken / "image" / "config.json").write_text("{")
    for arguments, message in [
        (["--model", "cogview-bse"], 'model "cogview-bse" is unknown; known: cogview-emoji, '),
        (["--model", str(broken)], f"{broken / 'image' / 'config.json'} is not JSON: "),
        (["--task", "draw"], "task 'draw' is unknown; known: generate, "),
        (["--dtype", "int7"], "invalid value for '--dtype': 'int7' is not one of 'auto', "),
        (["--device", "cuda:24TBX"], "device 'cuda:24TBX' is unknown; expected auto, cpu, cuda, cuda:N or mps, or a "),
        (["--device", "cuda:0GB"], "the size of the device must be above 0, got cuda:0GB"),
        (["-n", "0"], "invalid value for '-n': 0 is not in the range x>=1"),
        (["--bandwidth", "-1"], "invalid value for '--bandwidth': -1.0 is not in the range x>0"),
        (["--guidance", "nan"], "invalid value for '--guidance': nan is not a finite number"),
    ]:
        assert main(["estimate", "--device", "cpu:1GB", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"cogview estimate: {message}")
        assert err.count("\n") == 1


def test_estimate_help_does_not_import_torch():
    code = (
        "import sys; from cogview.cli.main import main; main(['estimate', '--help']); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--bandwidth" in result.stdout
