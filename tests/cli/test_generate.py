"""``cogview generate``: files, names, metadata, prompts, mistakes and interruptions."""

import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cogview.image_io.png
import cogview.pipeline.runner
from cogview import __version__
from cogview.checkpoints.fingerprint import fingerprint
from cogview.cli.main import main
from cogview.image_io.png import read_metadata
from tests.factories import assert_on_sheet

SEE = "; see cogview generate --help"
FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"


@pytest.fixture
def generate(tiny_checkpoint, tmp_path, monkeypatch, capsys, without_plans):
    """Return a function that runs the command in an empty folder: (status, printed files, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["generate", *arguments, "--model", str(tiny_checkpoint), "--device", "cpu"])
        printed = capsys.readouterr()
        return status, [Path(line) for line in printed.out.splitlines()], without_plans(printed.err)

    return run


class Terminal(io.StringIO):
    """Standard input or error that is a terminal."""

    def isatty(self):
        return True


def codes(path):
    return read_metadata(path)["codes"]


def test_generate_writes_the_images_of_several_prompts(generate, tiny_model):
    status, files, err = generate(FOX, DOG, "-n", "2", "--seed", "7", "-o", "画")
    assert status == 0
    assert files == [Path("画", f"{prompt}-seed7-{index}.png") for prompt in (FOX, DOG) for index in (0, 1)]
    assert err == f"{tiny_model.name} on cpu, float32 (no GPU is used), seed 7\ngenerating 4 images\n"
    expected = tiny_model.generate([FOX, DOG], n=2, seed=7)
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))
    assert sorted(os.listdir("画")) == sorted(file.name for file in files)


def test_generate_stores_the_settings_in_text_chunks(generate, tiny_checkpoint, tiny_model):
    _, [file], _ = generate(FOX, "--seed", "7", "--temperature", "0.7", "--top-k", "50", "--top-p", "0.9")
    texts = read_metadata(file)
    image = tiny_model.generate(FOX, seed=7, temperature=0.7, top_k=50, top_p=0.9)[0]
    assert float(texts.pop("log_probability")) == pytest.approx(image.log_probability)
    assert np.array_equal(np.array(texts.pop("codes").split(), dtype=int).reshape(8, 8), image.codes)
    label = f"tiny ({fingerprint(tiny_checkpoint)[:12]})"  # no path of this machine, nor the name of its user
    assert texts.pop("parameters") == (
        f"{FOX}\nSteps: 64, Sampler: cogview, CFG scale: 1.0, Seed: 7, Size: 64x64, Model: {label}, Temperature: 0.7, "
        f"Top k: 50, Top p: 0.9, Min p: 0.0, Text attention: 1.0, Noise version: 2, Version: cogview {__version__}"
    )
    assert texts == {
        "prompt": FOX,
        "seed": "7",
        "index": "0",
        "model": label,
        "temperature": "0.7",
        "top_k": "50",
        "top_p": "0.9",
        "min_p": "0.0",
        "guidance": "1.0",
        "text_attention": "1.0",
        "noise_version": "2",
        "dtype": "float32",
        "cogview": __version__,
    }


def test_generate_applies_guidance_and_text_attention(generate, tiny_model):
    _, [file], _ = generate(FOX, "--seed", "7", "--guidance", "3", "--text-attention", "1.5")
    texts = read_metadata(file)
    assert (texts["guidance"], texts["text_attention"]) == ("3.0", "1.5")
    image = tiny_model.generate(FOX, seed=7, guidance=3.0, text_attention=1.5)[0]
    assert texts["codes"] == " ".join(map(str, image.codes.flat))


def test_generate_leads_away_from_a_negative_prompt(generate, tiny_model):
    _, [file], _ = generate(FOX, "--seed", "7", "--guidance", "3", "--negative", DOG)
    texts = read_metadata(file)
    image = tiny_model.generate(FOX, seed=7, guidance=3.0, negative=DOG)[0]
    assert (texts["negative"], texts["codes"]) == (DOG, " ".join(map(str, image.codes.flat)))


def test_generate_keep_writes_the_best_images(generate, tiny_model):
    """No other image is written, and the kept ones equal those of a run without --keep, for any batch size."""
    arguments = (FOX, DOG, "-n", "4", "--seed", "7")
    _, every, _ = generate(*arguments, "-o", "all")
    status, lines, _ = generate(*arguments, "--keep", "2", "--max-inference-batch-size", "3", "--grid", "-o", "best")
    names, scores = zip(*(f"{line}\t".split("\t")[:2] for line in lines), strict=True)
    files = list(map(Path, names))
    assert status == 0
    assert sorted(os.listdir("best")) == [*(file.name for file in sorted(files))]
    expected = tiny_model.generate([FOX, DOG], n=4, keep=2, seed=7)
    assert [file.name for file in files] == [
        *(
            f"{image.prompt}-seed7-best{number % 2 + 1}-{image.index}.png"  # names sort from the best on
            for number, image in enumerate(expected)
        ),
        "grid-seed7.png",
    ]
    found = {file.name: codes(file) for file in every}
    for number, (file, score, image) in enumerate(zip(files[:-1], scores, expected, strict=False)):
        texts = read_metadata(file)
        assert texts["rank"] == str(number % 2 + 1)
        assert score == f"{float(texts['score']):.3f}"
        assert float(texts["score"]) == pytest.approx(image.score.log_probability, abs=1e-3)
        assert float(texts["score_per_piece"]) == pytest.approx(image.score.per_piece, abs=1e-3)
        assert texts["codes"] == found[f"{image.prompt}-seed7-{image.index}.png"]
    assert_on_sheet(files[-1], files[:-1])
    sheet = read_metadata(files[-1])
    assert sheet["score"] == " ".join(read_metadata(file)["score"] for file in files[:-1])
    assert (sheet["n"], sheet["keep"]) == ("4", "2")


def test_generate_keep_ranks_a_repeated_prompt_separately(generate):
    _, lines, _ = generate(FOX, FOX, "-n", "2", "--keep", "1", "--seed", "7")
    files = [str(line).split("\t")[0] for line in lines]
    assert [read_metadata(file)["index"] in pair for file, pair in zip(files, ("01", "23"), strict=True)] == [
        True,
        True,
    ]


def test_generate_upscale_also_writes_images_at_twice_their_side(generate, tiny_model):
    status, files, err = generate(FOX, "-n", "2", "--keep", "1", "--seed", "7", "--top-k", "50", "--upscale")
    assert status == 0
    [small] = tiny_model.generate(FOX, n=2, keep=1, seed=7, top_k=50)
    files = [Path(str(line).split("\t")[0]) for line in files]
    assert files == [Path("outputs", f"{FOX}-seed7-best1-{small.index}{end}.png") for end in ("", "-up")]
    [large] = tiny_model.upscale([small], FOX, seed=7, top_k=50)
    np.testing.assert_array_equal(np.asarray(Image.open(files[1])), np.asarray(large))
    assert Image.open(files[1]).size == (128, 128)
    texts = read_metadata(files[1])
    assert (texts["prompt"], texts["task"], texts["source"]) == (FOX, "upscale", files[0].name)
    assert err.endswith("generating 2 images\nupscaling 1 image\n")


def test_generate_defaults_to_the_settings_of_the_model(generate):
    _, [file], _ = generate(FOX, "--seed", "7")
    texts = read_metadata(file)
    assert (texts["temperature"], texts["top_k"], texts["top_p"]) == ("0.9", "100", "1.0")


def test_generate_gives_equal_images_for_any_batch_size(generate):
    arguments = (FOX, DOG, "狐狸", "-n", "3", "--seed", "7")
    _, together, _ = generate(*arguments, "-o", "a")
    _, apart, _ = generate(*arguments, "-o", "b", "--max-inference-batch-size", "2")
    assert [codes(file) for file in together] == [codes(file) for file in apart]
    assert [file.name for file in together] == [file.name for file in apart]


@pytest.mark.parametrize("given", ["0", "-2", "1.5", "viele", "", "00"])
def test_generate_rejects_a_batch_size_that_is_not_a_count(generate, given):
    assert generate(FOX, f"--max-inference-batch-size={given}") == (
        2,
        [],
        "cogview generate: invalid value for '--max-inference-batch-size': "
        f'"{given}" is not auto or a whole number from 1 on{SEE}\n',
    )


@pytest.mark.parametrize(
    ("ceiling", "plan"), [("auto", "3 at a time of 3 (all at once)"), ("2", "2 at a time of 3 (the ceiling)")]
)
def test_generate_logs_the_planned_batch_size(tiny_checkpoint, tmp_path, capsys, ceiling, plan):
    command = ["generate", FOX, "-n", "3", "--model", str(tiny_checkpoint), "--device", "cpu", "-o", str(tmp_path)]
    main([*command, "--max-inference-batch-size", ceiling])
    [printed_lines] = [line for line in capsys.readouterr().err.splitlines() if " at a time of " in line]
    assert printed_lines.startswith(f"generating: {plan}; ")
    assert printed_lines.endswith(" GB free")


def test_generate_quantizes_the_kv_cache(generate, tiny_checkpoint):
    from cogview.pipeline.cogview import CogView

    _, [file], _ = generate(FOX, "--seed", "7", "--kv-dtype", "int8")
    [image] = CogView.from_pretrained(tiny_checkpoint, device="cpu", kv_dtype="int8").generate(FOX, seed=7)
    assert codes(file) == " ".join(map(str, image.codes.flat))


@pytest.mark.parametrize("how", ["off", "auto", "5"])
def test_generate_gives_equal_images_with_speculative_decoding(generate, how):
    _, [file], _ = generate(FOX, "--seed", "7", "--parallel", how, "-o", how)
    _, [expected], _ = generate(FOX, "--seed", "7", "-o", "plain")
    assert codes(file) == codes(expected)


def test_generate_shows_a_progress_bar_on_a_terminal(generate, monkeypatch):
    """It shows finished images, codes and images per second, and the remaining time."""
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    generate(FOX, DOG, "--seed", "7", "--max-inference-batch-size", "1")
    drawn = screen.getvalue().split("\r")
    found = [re.search(r"(\d+)%\|.*\| .* codes/s, (\d)/2 images, .* images/s, \S+ left", text) for text in drawn]
    assert ("100", "1") in [match.groups() for match in found if match]
    assert "generating 2 images" not in screen.getvalue()


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_generate_preview_shows_unfinished_images(generate, monkeypatch, tiny_model, seconds):
    """They are written after each quarter at least, grey where no code is decoded."""
    monkeypatch.setattr("cogview.cli.progress.PREVIEW_SECONDS", seconds)
    monkeypatch.setattr("cogview.cli.progress.PREVIEW_SHARE", 1e9)
    seen = []

    def write(path, image, texts):
        write_png(path, image, texts)
        if path.name.endswith(".preview.png"):
            assert not path.with_name(path.name.replace(".preview", "")).exists()
            seen.append((path.name, np.asarray(Image.open(path))))

    write_png = cogview.image_io.png.write_png
    monkeypatch.setattr("cogview.image_io.png.write_png", write)
    status, files, _ = generate(FOX, DOG, "--seed", "7", "--preview")
    assert status == 0
    assert sorted(os.listdir("outputs")) == sorted(file.name for file in files)
    for file, image in zip(files, tiny_model.generate([FOX, DOG], seed=7), strict=True):
        own = [pixels for name, pixels in seen if name == f"{file.stem}.preview.png"]
        lines = [round((pixels != 128).any(axis=(1, 2)).sum() / 8) for pixels in own]
        assert lines == sorted(lines)
        assert 1 <= lines[0] < 8
        assert len(lines) >= (3 if seconds else 4)
        assert lines[-1] > 4
        np.testing.assert_array_equal(own[-1][:8], np.asarray(image)[:8])  # all its neighbours are decoded
    assert len(seen) <= (8 if seconds else 14)


def test_generate_preview_removes_files_after_an_interruption(generate, monkeypatch):
    decode = cogview.pipeline.runner.decode

    def interrupted_decode(transformer, vocabulary, jobs, watch, **settings):
        def look(moment):
            watch(moment)
            if moment.done >= moment.total / 2:
                assert os.listdir("outputs") == [f"{FOX}-seed7-0.preview.png"]
                raise KeyboardInterrupt
            return True

        return decode(transformer, vocabulary, jobs, look, **settings)

    monkeypatch.setattr(cogview.pipeline.runner, "decode", interrupted_decode)
    assert generate(FOX, "--seed", "7", "--preview")[0] == 130
    assert os.listdir("outputs") == []


def test_generate_overwrites_only_equal_images(generate):
    _, [first], _ = generate(FOX, "--seed", "7")
    _, [same], _ = generate(FOX, "--seed", "7")
    _, [warmer], _ = generate(FOX, "--seed", "7", "--temperature", "1.5")
    assert same == first == Path("outputs", f"{FOX}-seed7-0.png")
    assert warmer == Path("outputs", f"{FOX}-seed7-0_2.png")
    assert read_metadata(first)["temperature"] == "0.9"


def test_generate_numbers_files_of_prompts_with_equal_names(generate):
    prompts = ["狐狸/狗", "狐狸?狗", "狐狸/狗"]
    _, files, _ = generate(*prompts, "--seed", "7")
    assert [file.name for file in files] == ["狐狸_狗-seed7-0.png", "狐狸_狗-seed7-0_2.png", "狐狸_狗-seed7-1.png"]
    assert [read_metadata(file)["prompt"] for file in files] == prompts


def test_generate_continues_the_numbers_of_a_repeated_prompt(generate):
    _, twice, _ = generate(FOX, FOX, "--seed", "7", "-o", "a")
    _, once, _ = generate(FOX, "-n", "2", "--seed", "7", "-o", "b")
    assert [codes(file) for file in twice] == [codes(file) for file in once]


def test_generate_grid_writes_a_contact_sheet(generate):
    status, files, _ = generate(FOX, DOG, "-n", "3", "--seed", "7", "--grid")
    assert status == 0
    assert files[-1] == Path("outputs/grid-seed7.png")
    assert_on_sheet(files[-1], files[:-1])
    texts = read_metadata(files[-1])
    assert (texts["prompt"], texts["captions"]) == (f"{FOX}\n{DOG}", f"1: {FOX}\n2: {DOG}")


def test_generate_accepts_options_between_prompts(generate):
    _, files, _ = generate(FOX, "--seed", "7", DOG)
    assert [read_metadata(file)["prompt"] for file in files] == [FOX, DOG]


def test_generate_asks_for_prompts_on_a_terminal(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(f"{FOX}\n{'长' * 50}\n{FOX}\n\n{DOG}\n"))
    status, files, err = generate("--seed", "7")
    assert status == 0
    assert [file.name for file in files] == [f"{FOX}-seed7-0.png", f"{FOX}-seed7-1.png"]
    assert err.count("seed 7") == 1  # the model was loaded once
    assert "What shall I generate? (an empty line ends)" in err
    assert "skipped: the prompt “长长长" in err


def test_generate_asks_until_the_end_of_input(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(FOX))
    assert len(generate()[1]) == 1


def test_generate_prints_the_random_seed(generate):
    _, [file], err = generate(FOX)
    assert f"seed {read_metadata(file)['seed']}\n" in err


def test_generate_skips_prompts_that_cannot_be_used(generate):
    status, files, err = generate("", FOX, DOG * 3, "--seed", "7", "--grid")
    assert status == 1
    assert [file.name for file in files] == [f"{FOX}-seed7-0.png", "grid-seed7.png"]
    assert [line for line in err.splitlines() if line.startswith("skipped: ")] == [
        "skipped: the prompt is empty; describe an image, for example 一个红苹果",
        "skipped: the prompt “蓝色背景上的三只狗蓝色背景上的三只狗蓝色…” is 27 pieces long, 20 fit; shorten it",
    ]


def test_generate_writes_nothing_when_all_prompts_are_skipped(generate):
    status, files, err = generate(DOG * 3, "--grid")
    assert (status, files) == (2, [])
    assert "generating" not in err


def test_generate_notes_unknown_objects_and_characters(generate, tiny_checkpoint):
    _, files, err = generate(FOX, "两只狸子", "ａｂｃ汽车", "--seed", "7")
    assert len(files) == 3
    model = tiny_checkpoint
    assert [line for line in err.splitlines() if line.startswith("note: ")] == [
        "note: “两只狸子”: it names none of the things that the model was trained on, such as 狐狸、狗、红苹果; "
        f"all of them: cogview info {model} --things",
        "note: “ａｂｃ汽车”: 60% of its characters are unknown to the model",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([FOX, "-n", "0"], f"invalid value for '-n': 0 is not in the range 1<=x<=100000{SEE}"),
        ([FOX, "-n", "9" * 20], f"invalid value for '-n': {'9' * 20} is not in the range 1<=x<=100000{SEE}"),
        (
            [FOX, "--max-inference-batch-size", "-3"],
            f"invalid value for '--max-inference-batch-size': \"-3\" is not auto or a whole number from 1 on{SEE}",
        ),
        ([FOX, "--seed", "-1"], "the seed must be from 0 to 9223372036854775807, got -1"),
        ([FOX, "--temperature", "0"], f"invalid value for '--temperature': 0.0 is not in the range x>0{SEE}"),
        (
            [FOX, "--temperature", "inf"],
            "temperature must be finite, got inf; for a wider choice of ids raise --top-k or --top-p",
        ),
        ([FOX, "--temperature", "nan"], "temperature must be above 0, got nan; for greedy decoding use --top-k 1"),
        ([FOX, "--top-p", "2"], f"invalid value for '--top-p': 2.0 is not in the range 0<x<=1{SEE}"),
        ([FOX, "--top-k", "-1"], f"invalid value for '--top-k': -1 is not in the range x>=0{SEE}"),
        ([FOX, "--top-k", "一些"], f"invalid value for '--top-k': '一些' is not a valid integer range{SEE}"),
        (
            [FOX, "--negative", DOG],
            "a negative prompt has no effect without guidance: set guidance to another value than 1",
        ),
        (["--input", "a.txt", "--negative", DOG], "--negative goes with PROMPT, not with the lines of --input"),
        ([FOX, "--guidance", "-1"], f"invalid value for '--guidance': -1.0 is not in the range x>=0{SEE}"),
        ([FOX, "--text-attention", "0"], f"invalid value for '--text-attention': 0.0 is not in the range x>0{SEE}"),
        ([FOX, "--keep", "0"], f"invalid value for '--keep': 0 is not in the range x>=1{SEE}"),
        ([FOX, "--rank-by", "both"], "--rank-by both chooses among images: add --keep COUNT"),
        ([FOX, "-n", "4", "--keep", "5"], "--keep must be from 1 to 4, the images per prompt (-n), got 5"),
        ([FOX, "--resume"], "--resume continues a job: give its file by --input FILE"),
        (
            [FOX, "--parallel", "0"],
            "invalid value for '--speculative' / '--parallel': "
            f'"0" is not auto, off or a whole number from 1 on{SEE}',
        ),
        (
            [FOX, "--speculative", str(10**12)],
            "invalid value for '--speculative' / '--parallel': "
            f'"1000000000000" is too large; expected at most 999999999{SEE}',
        ),
        ([FOX, "--kv-dtype", "int4"], f"invalid value for '--kv-dtype': 'int4' is not one of 'auto', 'int8'{SEE}"),
        ([FOX, "-o", "blank.txt"], "the output folder blank.txt cannot be written: it is a file; choose another"),
        ([], 'no prompt was given; write it after the command: cogview generate "一个红苹果"'),
    ],
)
def test_generate_reports_mistakes_in_one_line(generate, monkeypatch, arguments, message):
    Path("blank.txt").write_text("\n \n")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, files, err = generate(*arguments)
    assert (status, files) == (2, [])
    assert err == f"cogview generate: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--keep", "1"],
            "was not trained for the task 'caption'; its tasks are: generate",
        ),
        (["--upscale"], "was not trained for the task 'upscale'; its tasks are: generate"),
        (["--guidance", "2"], "was trained without caption dropout, so it cannot be guided: guidance must be 1, "),
    ],
)
def test_generate_rejects_a_model_without_the_task(generation_checkpoint, tmp_path, capsys, arguments, message):
    command = ["generate", FOX, "--model", str(generation_checkpoint), "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main([*command, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cogview generate: {generation_checkpoint} {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_generate_checks_the_output_folder_before_loading_the_model(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["generate", FOX, "--model", "没有", "-o", str(tmp_path / "file")]) == 2
    assert "file cannot be written: it is a file" in capsys.readouterr().err


def test_generate_rejects_an_unknown_model(tmp_path, capsys):
    assert main(["generate", FOX, "--model", "cogview-bse", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith('cogview generate: checkpoint "cogview-bse" is unknown; known: ')


def test_generate_keeps_finished_images_after_an_interruption(generate, monkeypatch, tiny_model):
    decode, calls = cogview.pipeline.runner.decode, []

    def interrupted_decode(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*arguments, **settings)

    monkeypatch.setattr(cogview.pipeline.runner, "decode", interrupted_decode)
    status, files, err = generate(FOX, "-n", "7", "--seed", "7", "--max-inference-batch-size", "2", "--grid")
    assert status == 130
    assert err.endswith("cogview generate: interrupted; finished results are kept\n")
    assert [file.name for file in files] == [f"{FOX}-seed7-{index}.png" for index in range(4)]
    assert sorted(os.listdir("outputs")) == [file.name for file in files]
    for file, image in zip(files, tiny_model.generate(FOX, n=4, seed=7), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))


def test_generate_keeps_finished_images_when_the_disk_is_full(generate, disk_for_two_images):
    status, files, err = generate(FOX, "-n", "4", "--seed", "7")
    assert status == 3
    assert "[Errno" not in err
    assert "the disk is full; finished results are kept" in err.splitlines()[-1]
    assert sorted(os.listdir("outputs")) == [file.name for file in files]
    assert len(files) == 2


def test_generate_help_lists_every_option(capsys):
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("PROMPT", "--input", "-n", "--seed", "--output", "--temperature", "--top-k", "--top-p", "--model"):
        assert option in out
    for option in (
        "--max-inference-batch-size",
        "--kv-dtype",
        "--parallel",
        "--preview",
        "--resume",
        "--grid",
        "--keep",
        "--upscale",
        "--guidance",
        "--negative",
        "--text-attention",
    ):
        assert option in out
