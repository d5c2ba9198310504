"""``cogview adapter``, and --adapter of the commands that generate."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.benchmark import report
from cogview.benchmark.measure import MeasurementError
from cogview.checkpoints.adapter import PREFIX, BaseModelInfo, save_adapter
from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.precision import Precision
from cogview.checkpoints.v1_convert import convert_folder
from cogview.cli.main import main
from cogview.image_io.png import read_metadata
from cogview.modeling.lora import LoraSettings
from cogview.modeling.quantization import dequantize_weight, quantized_names
from cogview.modeling.transformer import Transformer
from cogview.planning.hardware import HardwareSpeed

FOX = "一只狐狸"
TARGETS = ("attention.query_key_value", "mlp.output")


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    """Write an adapter of the tiny model with random weights; return its folder."""
    config = read_config(tiny_checkpoint)
    transformer = Transformer(config.transformer)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, module in transformer.named_modules():
        if name.endswith(TARGETS):
            outputs, inputs = module.weight.shape
            for part, shape in (("A", (4, inputs)), ("B", (outputs, 4))):
                weights[f"{name}.lora_{part}.default.weight"] = torch.randn(shape, generator=generator) / 5
    folder = tmp_path_factory.mktemp("adapters") / "foxes"
    settings = LoraSettings(rank=4, alpha=8.0, targets=TARGETS)
    save_adapter(folder, transformer, settings, BaseModelInfo.of("tiny", config), weights)
    return folder


def is_named_after(name, *folders):
    """Return whether the metadata name folders by their last parts and hashes, not by the paths of this machine."""
    return re.fullmatch(r" \+ ".join(rf"{re.escape(folder.name)} \([0-9a-f]{{12}}\)" for folder in folders), name)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command in an empty folder: (status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err

    return run


def test_adapter_gives_equal_images_merged_on_load_or_in_a_folder(run, run_command, tiny_checkpoint, adapter, tmp_path):
    assert run("adapter", "merge", tiny_checkpoint, adapter, "-o", "merged") == (0, ["merged"], "")
    metadata = {}
    for name, options in {
        "option": ["--adapter", str(adapter)],
        "folder": ["--model", "merged"],
        "without": [],
    }.items():
        status, (path,), err = run_command("generate", FOX, "--seed", "7", "-o", name, *options)
        assert status == 0
        metadata[name] = read_metadata(tmp_path / path)
        if name == "option":
            assert err.startswith(f"{tiny_checkpoint} + {adapter} on cpu")
    assert metadata["option"]["codes"] == metadata["folder"]["codes"] != metadata["without"]["codes"]
    assert is_named_after(metadata["option"]["model"], tiny_checkpoint, adapter)


def test_adapter_merge_writes_a_complete_folder(run, tiny_checkpoint, adapter, tmp_path):
    run("adapter", "merge", tiny_checkpoint, adapter, "-o", "merged")
    names = sorted(path.relative_to(tiny_checkpoint) for path in tiny_checkpoint.rglob("*"))
    assert sorted(path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*")) == names
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# tiny\n\nMerged with the LoRA adapter `foxes` (rank 4, scale 2, SHA-256 ")
    for name in names:
        if (tiny_checkpoint / name).is_file() and str(name) not in ("README.md", "model.safetensors"):
            assert (tmp_path / "merged" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, Path("merged")))
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed == {f"layers.{layer}.{target}.weight" for layer in (0, 1) for target in TARGETS}

    assert run("adapter", "unmerge", "merged", adapter, "-o", "back") == (0, ["back"], "")
    assert Path("back/README.md").read_text(encoding="utf-8") == "# tiny\n"
    for name, tensor in load_file("back/model.safetensors").items():
        torch.testing.assert_close(tensor, old[name], atol=1e-6, rtol=0)


def test_adapter_merge_keeps_the_dtype(run, tiny_checkpoint, adapter, tmp_path):
    convert_folder(tiny_checkpoint, tmp_path / "half", precision=Precision(torch.bfloat16))
    run("adapter", "merge", "half", adapter, "-o", "merged")
    assert {tensor.dtype for tensor in load_file("merged/model.safetensors").values()} == {torch.bfloat16}


def test_adapter_reports_a_repeated_or_missing_merge(run, tiny_checkpoint, adapter):
    run("adapter", "merge", tiny_checkpoint, adapter, "-o", "once")
    _, _, err = run("adapter", "merge", "once", adapter, "-o", "twice")
    assert "note: the card says that the LoRA adapter `foxes`" in err
    assert "was merged before: now it counts twice" in err
    status, _, err = run("adapter", "unmerge", tiny_checkpoint, adapter, "-o", "less")
    assert (status, "note: the card does not say that the LoRA adapter `foxes`" in err) == (0, True)
    assert "Without the LoRA adapter `foxes`" in Path("less/README.md").read_text(encoding="utf-8")


def test_adapter_info_prints_the_settings(run, adapter, tiny_checkpoint, tmp_path):
    status, lines, _ = run("adapter", "info", adapter)
    facts = dict(line.split(": ", 1) for line in lines)
    assert status == 0
    assert facts["base model"] == "tiny"
    assert (facts["rank"], facts["alpha"]) == ("4", "8, which scales by 2")
    assert facts["targets"] == ", ".join(TARGETS)
    assert (facts["projections"], facts["parameters"].split()[0]) == ("4", f"{2 * 4 * (32 + 96 + 128 + 32):,}")
    assert facts["shape"].startswith("2 layers, width 32, 2 heads, ")
    assert facts["codebook"] == read_config(tiny_checkpoint).codebook_sha256
    (other := tmp_path / "other").mkdir()
    save_file(load_file(adapter / "adapter_model.safetensors"), other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    _, lines, _ = run("adapter", "info", other)
    assert lines[0] == "base model: unknown"


def test_adapter_reports_mistakes_in_one_line(run, tiny_checkpoint, adapter, tmp_path):
    (tmp_path / "there").mkdir()
    for arguments, words in (
        (("merge", tiny_checkpoint, adapter, "-o", "there"), "there is there already: remove it, or choose another"),
        (("merge", "cogview-bse", adapter, "-o", "out"), 'checkpoint "cogview-bse" is unknown'),
        (("merge", tiny_checkpoint, "nowhere", "-o", "out"), "there is no adapter at nowhere"),
        (("info", tiny_checkpoint), "is incomplete: adapter_config.json is missing"),
        (("merge", tiny_checkpoint, f"{adapter}:nan", "-o", "out"), "the scale of an adapter must be from -100 to 100"),
        (("merge", "cogview-emoji", adapter, "-o", "out"), "belongs to a model of 2 layers of width 32 with 2 heads"),
    ):
        status, out, err = run("adapter", *arguments)
        assert (status, out, err.count("\n")) == (2, [], 1)
        assert err.startswith("cogview adapter: ")
        assert words in err
    assert not (tmp_path / "out").exists()
    assert run("adapter", "merge", tiny_checkpoint, adapter)[0] == 2


def test_adapter_option_is_refused_for_a_bundle(run, tiny_checkpoint, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("cogview.pipeline.model.resolve_bundle", lambda name: {"generate": tiny_checkpoint})
    status, _, err = run("generate", FOX, "--model", "cogview-released", "--adapter", adapter, "--device", "cpu")
    assert (status, err.count("\n")) == (2, 1)
    assert "cogview-released is a bundle of models, an adapter belongs to one: name one of cogview-base, " in err


def test_adapter_option_applies_to_every_task(run_command, adapter, save_image):
    save_image("fox.png")
    for command in (
        ["complete", "fox.png", "--prompt", FOX, "--rows", "7"],
        ["upscale", "fox.png", "--prompt", FOX, "--low-level"],
        ["caption", "fox.png"],
        ["rerank", "fox.png", "--prompt", FOX],
    ):
        status, lines, err = run_command(*command, "--adapter", str(adapter))
        assert (status, len(lines)) == (0, 1)
        assert f" + {adapter} on cpu" in err
        status, _, err = run_command(*command, "--adapter", "nowhere")
        assert (status, "there is no adapter at nowhere" in err) == (2, True)


def test_adapter_option_must_be_equal_to_resume_a_job(run_command, adapter, tmp_path):
    (tmp_path / "job.txt").write_text(f"{FOX}\n", encoding="utf-8")
    job = ["generate", "--input", "job.txt", "--seed", "7"]
    assert run_command(*job, "--adapter", str(adapter))[0] == 0
    assert run_command(*job, "--adapter", str(adapter), "--resume")[0] == 0
    for others in ([], ["--adapter", f"{adapter}:0.5"], ["--adapter", str(adapter), "--adapter", str(adapter)]):
        status, _, err = run_command(*job, *others, "--resume")
        assert (status, "adapters" in err) == (2, True), err


def test_bench_measures_a_model_with_adapters(run, tiny_checkpoint, adapter, monkeypatch):
    loaded = []

    def measure(target, rows, **settings):
        loaded.append(target.load().transformer.get_parameter("layers.0.mlp.output.weight"))
        raise MeasurementError("not measured")

    monkeypatch.setattr(report, "measure_hardware", lambda *_: HardwareSpeed(bandwidth=1, flops=1, starts_ahead=False))
    monkeypatch.setattr(report, "measure_in_subprocess", measure)
    bench = ("bench", "--model", tiny_checkpoint, "--batch", "1", "--device", "cpu")
    for options in ([], ["--adapter", adapter], ["--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:0.5"]):
        _, lines, _ = run(*bench, *options)
        assert lines[0].startswith(" + ".join([str(tiny_checkpoint), *map(str, options[1::2])]) + ": 2 layers")
    plain, whole, halves = loaded
    assert not torch.equal(plain, whole)
    torch.testing.assert_close(halves, whole, atol=1e-6, rtol=0)
    for options, words in (
        (["--model", "cogview-emoji", "--adapter", adapter], "belongs to a model of 2 layers"),
        (["--random", "1x32x2", "--adapter", adapter], "--adapter needs a trained model, not --random"),
    ):
        status, _, err = run("bench", "--batch", "1", "--device", "cpu", *options)
        assert (status, words in err) == (2, True)


def test_adapter_option_applies_to_the_v1_scripts(tiny_checkpoint, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import generate_samples

    (tmp_path / "lines.txt").write_text(f"{FOX}\n", encoding="utf-8")
    flags = ["--input-source", "lines.txt", "--load", str(tiny_checkpoint), "--batch-size", "1", "--device", "cpu"]
    assert generate_samples.main([*flags, "--adapter", str(adapter)]) == 0
    name = read_metadata(tmp_path / capsys.readouterr().out.strip())["model"]
    assert is_named_after(name, tiny_checkpoint, adapter)


def test_several_adapters_are_named_with_their_scales_and_repeated(
    run, run_command, tiny_checkpoint, adapter, tmp_path
):
    """The command that info prints names them by the last parts of their folders."""
    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    for name in ("foxes", "step:7"):
        shutil.copytree(adapter, tmp_path / name)
    given = ["--adapter", str(tmp_path / "foxes:0.25"), "--adapter", f"{tmp_path / 'step:7'}:1"]
    status, (path,), err = run_command("generate", FOX, "--seed", "7", "-o", "first", "--model", "tiny", *given)
    assert (status, err.startswith(f"tiny + {tmp_path / 'foxes:0.25'} + {tmp_path / 'step:7:1'} on cpu")) == (0, True)
    texts = read_metadata(tmp_path / path)
    assert re.fullmatch(
        r"tiny \([0-9a-f]{12}\) \+ foxes \([0-9a-f]{12}\):0.25 \+ step:7 \([0-9a-f]{12}\)", texts["model"]
    )
    _, facts, _ = run("info", path)
    command = shlex.split(next(line for line in facts if line.startswith("command: ")).removeprefix("command: "))
    assert [word for word in command if "foxes" in word or "step" in word] == ["foxes:0.25", "step:7:1"]
    _, (again,), _ = run(*command[1:], "-o", "again", "--device", "cpu")
    assert read_metadata(tmp_path / again)["codes"] == texts["codes"]


def test_adapter_merge_takes_several_adapters_with_scales(run, run_command, tiny_checkpoint, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "twin")
    given = (f"{adapter}:0.5", "twin:0.75")
    assert run("adapter", "merge", tiny_checkpoint, *given, "-o", "merged") == (0, ["merged"], "")
    card = (tmp_path / "merged/README.md").read_text(encoding="utf-8")
    assert re.findall(r"`(\w+)` \(rank 4, scale ([\d.]+),", card) == [("foxes", "1"), ("twin", "1.5")]
    codes = set()
    for options in (["--adapter", given[0], "--adapter", given[1]], ["--model", "merged"]):
        _, (path,), _ = run_command("generate", FOX, "--seed", "7", *options)
        codes.add(read_metadata(tmp_path / path)["codes"])
    assert len(codes) == 1
    assert run("adapter", "unmerge", "merged", *given, "-o", "back")[0] == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, Path("back")))
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, old[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_adapter_merge_keeps_a_quantization(run, tiny_checkpoint, adapter, tmp_path, quantization):
    """The weights are those of float weights with the adapter, up to the rounding of both quantizations."""
    convert_folder(tiny_checkpoint, tmp_path / "rounded", precision=Precision(quantization=quantization))
    assert run("adapter", "merge", "rounded", adapter, "-o", "merged")[0] == 0
    assert run("adapter", "merge", tiny_checkpoint, adapter, "-o", "float")[0] == 0
    name, stored = "layers.0.mlp.output.weight", load_file("merged/model.safetensors")
    assert stored[name].dtype == (torch.int8 if quantization == "int8" else torch.uint8)
    restored = dequantize_weight(stored[name], stored[quantized_names(name, quantization)[1]], quantization)
    expected = load_file("float/model.safetensors")[name]
    steps = 127 if quantization == "int8" else 7.5
    assert (restored - expected).abs().max() < 1.2 * expected.abs().max() / steps
    assert run("generate", FOX, "--model", "merged", "--device", "cpu")[0] == 0


def test_adapter_merge_needs_no_peft(run, tiny_checkpoint, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run("adapter", "merge", tiny_checkpoint, adapter, "-o", "merged")[0] == 0
    assert all(name.startswith(PREFIX) for name in load_file(adapter / "adapter_model.safetensors"))
