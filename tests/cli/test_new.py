"""``cogview new``: from a folder of pictures to a recipe, and by ``cogview run`` to a model that generates."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from cogview.checkpoints.checkpoint import read_config
from cogview.cli import evaluate_samples, package, run, train_image
from cogview.cli.main import main
from cogview.cli.package import PackageSettings
from cogview.cli.steps import encode_settings, image_settings, text_settings, transformer_settings
from cogview.data.builders.pictures import PictureBuild
from cogview.data.builders.prepare import is_held_out, pixel_digest
from cogview.data.sources.tables import TableOptions
from cogview.evaluation.manifest import read_result
from cogview.modeling import config
from cogview.modeling.config import TransformerConfig
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training import new_adapter, new_model, step_records, step_speed
from cogview.training.new_model import NewRecipe, StepTime
from cogview.training.new_recipe import SIZES, choose_for, line, render_lines, steps_for
from cogview.training.recipe import Recipe
from cogview.training.survey import survey_pictures
from cogview.training.trainer import TransformerTrainer
from cogview.training.vqvae_trainer import VQVAETrainer

COLOURS = {"红": (220, 30, 30), "蓝": (30, 60, 220), "绿": (20, 160, 60), "黄": (240, 210, 40), "黑": (20, 20, 20)}
SHAPES = {"圆": "ellipse", "方块": "rectangle", "线": "line", "扇形": "pieslice"}


def draw_pictures(folder: Path) -> None:
    """Draw 40 pictures: four shapes of five colours on two grounds, with captions."""
    folder.mkdir()
    for number in range(40):
        (colour, paint), (shape, method) = list(COLOURS.items())[number % 5], list(SHAPES.items())[number // 5 % 4]
        image = Image.new("RGB", (96, 96), "white" if number < 20 else (180, 180, 180))
        more = {"start": 0, "end": 120} if method == "pieslice" else {"width": 9} if method == "line" else {}
        getattr(ImageDraw.Draw(image), method)((20, 20, 76, 76), fill=paint, **more)
        image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"{'白灰'[number // 20]}色背景上的{colour}色{shape}", encoding="utf-8")


@pytest.fixture
def new(tmp_path, monkeypatch, capsys):
    """Return a function that runs ``cogview new`` in an empty folder, with planted times of steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_model, "image_step_seconds", lambda *arguments: (0.5, "float32"))
    monkeypatch.setattr(new_model, "transformer_step_seconds", lambda *arguments: (2.0, "float32"))

    def run(*arguments):
        status = main(["new", *arguments, "--device", "cpu"])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.mark.parametrize("size", SIZES)
def test_new_recipe_is_valid_and_gives_reasons(new, size):
    draw_pictures(Path("shapes"))
    status, out, err = new("mine", "--pictures", "shapes", "--size", size, "--seed", "7")
    assert (status, out) == (0, ["mine/recipe.yaml"])
    assert err[-1] == "next: cogview run mine/recipe.yaml"
    recipe = Recipe.open(Path("mine/recipe.yaml"))
    assert recipe.work == Path("mine")
    image, encode, transformer = image_settings(recipe), encode_settings(recipe), transformer_settings(recipe)
    assert text_settings(recipe).pictures == image.pictures == encode.pictures == (Path("shapes"),)
    assert (image.side, image.fit, image.held_out) == (encode.side, encode.fit, encode.held_out)
    assert (image.training.seed, transformer.training.seed) == (7, 7)
    assert recipe.settings(PackageSettings, "package").licence == "not stated"
    text = Path("mine/recipe.yaml").read_text(encoding="utf-8")
    assert "# 4 of 40 pictures, which the model never sees: they measure it" in text
    hours = transformer.training.steps * 2 / 3600
    if size in ("tiny", "small"):
        assert hours < 1, "40 pictures need few steps"
        assert "train-image " in text
        assert "captions of 9 to 10 characters, 18 different ones in all" in text
    assert ("needs several GPUs" in text) == (size == "4b")


def test_new_recipe_holds_out_the_pictures_that_it_names(new, tmp_path):
    draw_pictures(Path("shapes"))
    Path("shapes/broken.png").write_bytes(b"nothing")
    Path("shapes/broken.txt").write_text("坏", encoding="utf-8")
    assert new("mine", "--pictures", "shapes")[0] == 0
    text = Path("mine/recipe.yaml").read_text("utf-8")
    assert "# 41 entries: 40 pictures with captions, 1 that cannot be used\n" in text
    assert "# captions of these pictures: 40; different texts: 41\n" in text
    assert "# the first entry that cannot be used: shapes/broken.png" in text
    Path("shapes/broken.png").unlink()
    share = yaml.safe_load(Path("mine/recipe.yaml").read_text(encoding="utf-8"))["image"]["held_out"]
    digests = [pixel_digest(Image.open(path).convert("RGB")) for path in Path("shapes").glob("*.png")]
    assert sum(is_held_out(digest, share) for digest in digests) == 4


TINY = [
    "text.held_out=0",
    "image.init_from=null",
    "image.model={channels: [4, 8, 8], encoder_blocks: [0, 0, 1], num_codes: 16, code_width: 4}",
    "image.training={steps: 4, batch_size: 4, warmup_steps: 1}",
    "image.run={save_every: 2, evaluate_every: 0}",
    "image.num_workers=0",
    "encode.num_workers=0",
    "transformer.preset=tiny",
    "transformer.num_layers=1",
    "transformer.training={steps: 4, batch_size: 2, warmup_steps: 1}",
    "transformer.run={save_every: 2, evaluate_every: 0}",
]


@pytest.fixture
def shapes(new, monkeypatch) -> list[str]:
    """The command line that runs a new recipe of 40 pictures with tiny settings."""
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    draw_pictures(Path("shapes"))
    assert new("mine", "--pictures", "shapes", "--size", "tiny")[0] == 0
    return ["run", "mine/recipe.yaml", *TINY, "--device", "cpu"]


@pytest.mark.slow
def test_new_and_run_end_in_a_model_that_generates(shapes, capsys):
    """From a folder of pictures to a picture by three commands."""
    assert main(shapes) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-3:] == [
        "mine/model",
        "mine/model/README.md",
        "mine/report/samples.png",
    ]
    steps = [entry["step"] for entry in json.loads(Path("mine/times.json").read_text())]
    assert steps == ["train-text", "train-image", "encode", "train", "eval samples", "package"]
    card = Path("mine/model/README.md").read_text(encoding="utf-8")
    assert "![samples](samples.png)" in card
    assert "| training captions | 36 |\n| held-out captions | 4 |" in card
    assert "| pictures of the image tokenizer | 36, and 4 held out |" in card
    assert "Licence of this model: not stated." in card
    assert "| transformer, loss | " in card
    report = json.loads(Path("mine/report/report-samples.json").read_text())
    assert list(report["image_tokenizer"]) == ["64"]
    result = read_result(Path("mine/report/result-samples.json"))
    assert result.results["reconstructions_64.psnr"].value == report["image_tokenizer"]["64"]["psnr"]
    assert result.results["nearest_is_own"].value == report["nearest_is_own"]["share"]
    is_short = report["nearest_is_own"]["share"] < evaluate_samples.FEW_OWN
    assert ("the training is probably too short" in printed.err) == is_short
    assert report["image_tokenizer"]["64"]["pictures"] == 4
    assert read_config(Path("mine/model")).reconstruction_psnr.median == report["reconstruction_psnr"]["median"]
    with Image.open("mine/model/samples.png") as sheet:
        assert sheet.width > 64
    captions = Path("mine/report/samples.txt").read_text(encoding="utf-8").splitlines()
    assert [caption.partition("：")[0] for caption in captions] == ["held out"] * 4 + ["trained on"] * 12
    assert f"\n1. {captions[0]}\n" in card
    assert "| training of the transformer | steps 4, batch_size 2, " in card
    assert main(["generate", "白色背景上的红色圆", "--model", "mine/model", "--device", "cpu"]) == 0
    assert len(list(Path("outputs").glob("*.png"))) == 1


@pytest.mark.slow
def test_new_adapter_and_run_end_in_an_adapter_that_generates(new, monkeypatch, capsys, tiny_checkpoint):
    pytest.importorskip("peft")
    shape = read_config(tiny_checkpoint).transformer
    monkeypatch.setitem(config.PRESETS, "tiny", (shape.num_layers + 1, shape.width, shape.num_heads))
    monkeypatch.setattr(new_adapter, "transformer_step_seconds", lambda *arguments: (2.0, "float32"))
    draw_pictures(Path("shapes"))
    base = str(tiny_checkpoint)
    status, out, err = new("mine", "--pictures", "shapes", "--adapter-for", base)
    assert (status, out) == (0, ["mine/recipe.yaml"])
    notes = "\n".join(line for line in err if line.startswith("note: "))
    assert f"the image tokenizer of {base} keeps these pictures at" in notes
    assert f"of the characters are no pieces of {base}, such as " in notes
    settings = transformer_settings(Recipe.open(Path("mine/recipe.yaml")))
    assert (settings.init_from, settings.tokenizers, settings.lora.rank) == (base, base, 8)
    short = ["transformer.training={steps: 2, batch_size: 2, warmup_steps: 1}", "encode.batch_size=8"]
    assert main(["run", "mine/recipe.yaml", *short, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in Path("mine/adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "cogview.json",
        "samples.png",
    ]
    card = Path("mine/adapter/README.md").read_text(encoding="utf-8")
    assert f"# An adapter of {base}" in card
    assert "| training captions | 36 |" in card
    assert main(["generate", "红色", "--model", base, "--adapter", "mine/adapter", "--device", "cpu"]) == 0


def test_new_writes_the_columns_of_a_table_into_the_recipe(new, save_image):
    rows = ["pic,words,other"]
    for number in range(6):
        save_image(f"{number}.png", number)
        rows.append(f"{number}.png,第{number}张图,x")
    Path("list.csv").write_text("\n".join(rows), encoding="utf-8")
    status, _, err = new("mine", "--pictures", "list.csv", "--size", "tiny")
    assert status == 2
    assert "--image-column" in err[-1]
    status, _, err = new("mine", "--pictures", "list.csv", "--size", "tiny", "--image-column", "pic")
    assert (status, err[-1].endswith('--caption-column among "words", "other"')) == (2, True)
    columns = ("--image-column", "pic", "--caption-column", "words")
    assert new("mine", "--pictures", "list.csv", "--size", "tiny", *columns)[0] == 0
    recipe = Recipe.open(Path("mine/recipe.yaml"))
    chosen = TableOptions(image_column="pic", caption_columns=("words",))
    assert text_settings(recipe).table == image_settings(recipe).table == encode_settings(recipe).table == chosen


def test_new_says_that_a_table_has_no_column_of_captions(new):
    Path("list.csv").write_text("image\na.png\n", encoding="utf-8")
    status, _, err = new("mine", "--pictures", "list.csv")
    assert status == 2
    assert 'captions need a column "caption" beside that of pictures' in err[-1]


def test_new_refuses_a_size_for_an_adapter(new):
    _, _, err = new("mine", "--pictures", "shapes", "--adapter-for", "cogview-emoji", "--size", "small")
    assert err == ["cogview new: --size is that of a whole model; with --adapter-for the size is that of its model"]


def result_files() -> dict[str, bytes]:
    """The files of a finished run; those of checksums hold the time when a store was written."""
    kept = ["text.model", "image", "store", "held-out-store", "model", "report"]
    paths = [path for name in kept for path in [Path("mine", name), *Path("mine", name).rglob("*")]]
    return {str(path): path.read_bytes() for path in paths if path.is_file() and path.suffix != ".sha256"}


@pytest.mark.slow
@pytest.mark.parametrize("device_failure", [KeyboardInterrupt, MemoryError])
def test_run_that_is_stopped_everywhere_gives_the_same_files(shapes, monkeypatch, device_failure):
    """A run is stopped before, within and after each long step, and continued each time."""
    assert main(shapes) == 0
    whole = result_files()
    shutil.move("mine/recipe.yaml", "recipe.yaml")
    shutil.rmtree("mine")
    Path("mine").mkdir()
    shutil.move("recipe.yaml", "mine/recipe.yaml")
    places = [
        (run, "run_words", 0),
        (VQVAETrainer, "step", 3),  # a checkpoint is after 2 steps
        (step_records, "record_step", 0),
        (PictureBuild, "_encode_rows", 0),
        (PictureBuild, "_finish", 0),
        (TransformerTrainer, "step", 3),
        (step_records, "record_step", 0),
        (package, "save_half", 0),
    ]
    for owner, name, calls in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop_after(getattr(owner, name), calls, device_failure))
            assert main(shapes) in (3, 130)
    assert main(shapes) == 0
    assert result_files() == whole


def stop_after(function, calls, error):
    """Return a function that raises an error after some calls."""
    made = []

    def stopping(*arguments, **settings):
        made.append(1)
        if len(made) > calls:
            raise error
        return function(*arguments, **settings)

    return stopping


def test_choices_follow_the_pictures(tmp_path, save_image):
    for number in range(6):
        name = f"wide/{number}.png"
        save_image(str(tmp_path / name), number, (64, 32))
        (tmp_path / name).with_suffix(".txt").write_text("很" * 30 * number + f"长{number}", encoding="utf-8")
    survey = survey_pictures([tmp_path / "wide"], print)
    choices = choose_for(survey, 64)
    assert choices.fit[0] == "pad"
    assert choices.fit[1].startswith("100% are far from square")
    assert choices.upscale[0] is False  # 32 pixels
    assert choices.text_width[0] == 128
    assert choices.text_width[1].endswith("1 may be too long and left out")
    assert choices.piece_length[0] == 1
    cut_out = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    for number in range(3):
        ImageDraw.Draw(cut_out).ellipse((9, 9, 70 + number, 70), fill=(200, 0, 0, 255))
        (tmp_path / "cut").mkdir(exist_ok=True)
        cut_out.save(tmp_path / f"cut/{number}.png")
        (tmp_path / f"cut/{number}.txt").write_text(f"圆{number}", encoding="utf-8")
    survey = survey_pictures([tmp_path / "cut"], print)
    assert choose_for(survey, 64).fit == ("pad", "100% have transparent parts: cut-outs lose heads and feet by crop")
    assert choose_for(survey, 64).upscale[0] is True
    assert survey.transparent == 3


def test_steps_for_show_each_caption_as_often_as_asked():
    assert steps_for(60, 96, 24, (0, 10_000)) == 250
    assert steps_for(60, 96, 24, (1000, 10_000)) == 1000
    assert steps_for(10**6, 96, 24, (0, 10_000)) == 10_000


def test_render_lines_moves_long_reasons_above():
    lines = [line("a", [line("b", [1, "二"], "short"), line("c", None, "long " * 30)]), line("d", {})]
    text = render_lines(lines)
    assert yaml.safe_load(text) == {"a": {"b": [1, "二"], "c": None}, "d": {}}
    assert "  b: [1, 二]  # short\n" in text
    assert f"  # {'long ' * 30}\n  c: null\n" in text


@pytest.mark.parametrize(
    ("image", "rest", "transformer", "trial"),
    [
        (600, 600, 600, []),
        (3000, 200, 1000, ["image.training.steps=250", "transformer.training.steps=125"]),
        (3000, 4000, 1000, ["image.training.steps=50", "transformer.training.steps=20"]),
        (3000, 200, None, []),
    ],
)
def test_trial_takes_20_minutes_or_the_warmup_of_each_training(image, rest, transformer, trial):
    times = (
        StepTime(name="train-image", seconds=image, section="image", steps=1000, warmup=50),
        StepTime(name="encode", seconds=rest),
        StepTime(name="train", seconds=transformer, section="transformer", steps=500, warmup=20),
    )
    assert NewRecipe(lines=(), machine="", times=times).trial() == trial


def test_new_prints_a_short_trial_of_a_long_recipe(new, save_image, monkeypatch):
    draw_pictures(Path("shapes"))
    assert "short trial" not in "".join(new("mine", "--pictures", "shapes", "--size", "tiny")[2])
    monkeypatch.setattr(new_model, "transformer_step_seconds", lambda *arguments: (60.0, "float32"))
    *_, line, _ = new("long", "--pictures", "shapes", "--size", "tiny")[2]
    assert line.startswith("for a short trial: cogview run long/recipe.yaml image.training.steps=")
    recipe = replace(Recipe.open(Path("long/recipe.yaml")), overrides_by_section=run.split_overrides(line.split()[7:]))
    assert transformer_settings(recipe).training.steps < 100


def test_step_seconds_are_of_real_steps():
    """Both trainers compute their steps; the time of few rows is scaled to the batch."""
    device = torch.device("cpu")
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8).numpy()
    tiny = new_model.VQVAEConfig(
        channels=(4, 8, 8), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), num_codes=16, code_width=4
    )
    lines: list[str] = []
    timer = step_speed.StepTimer(2, device, lines.append)
    seconds, precision = step_speed.image_step_seconds(None, tiny, pixels, 5, timer)
    assert seconds > 0
    assert precision in ("float32", "bfloat16")
    vocabulary = Vocabulary(num_image_codes=16, num_text_pieces=30)
    shape = TransformerConfig(num_layers=1, width=32, num_heads=2, vocabulary_size=vocabulary.padded_size)
    assert step_speed.transformer_step_seconds(shape, vocabulary, 20, 3, timer)[0] > 0
    total = len(lines)
    assert [line.partition(",")[0] for line in lines] == [
        f"timing {number} of {total}" for number in range(1, total + 1)
    ]
    assert "steps of the image tokenizer with a batch of 5, " in lines[total // 2 - 1]
    assert "steps of the transformer with a batch of 3, " in lines[-1]


@pytest.mark.parametrize(
    ("load", "times", "doubts"),
    [
        (0.1, [9, 1, 1.2], []),
        (13.4, [9, 1, 1.2], ["the machine was busy: load 13.4, cores 2"]),
        (0.1, [1, 1, 3], ["equal steps differed by a factor of 3.0: steps"]),
    ],
)
def test_step_timer_doubts_times_of_a_busy_machine(monkeypatch, load, times, doubts):
    """An estimate under the load of others was printed as if it were that of the machine."""
    now = iter([0.0, times[0], 20.0, 20.0 + times[1], 40.0, 40.0 + times[2]])
    monkeypatch.setattr(step_speed.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(step_speed.os, "cpu_count", lambda: 2)
    timer = step_speed.StepTimer(1, torch.device("cpu"), str)
    monkeypatch.setattr(step_speed.time, "perf_counter", lambda: next(now))
    timer.seconds_of(lambda: None, "steps")
    monkeypatch.undo()
    assert timer.doubts == doubts


def test_new_says_that_its_estimate_is_unreliable(new, monkeypatch):
    draw_pictures(Path("shapes"))
    monkeypatch.setattr(step_speed.os, "getloadavg", lambda: (1000.0, 0.0, 0.0), raising=False)
    err = new("mine", "--pictures", "shapes")[2]
    assert err[-2].startswith("note: the estimate is unreliable: the machine was busy: load 1000.0, cores ")
    assert "# the estimate is unreliable: the machine was busy" in Path("mine/recipe.yaml").read_text(encoding="utf-8")


def test_new_asks_for_peft_before_it_reads_pictures(new, monkeypatch):
    """It was missed after the encoding of all pictures."""
    monkeypatch.setitem(sys.modules, "peft", None)
    status, _, err = new("mine", "--pictures", "nothing", "--adapter-for", "cogview-emoji")
    assert status == 2
    assert err == ["cogview new: adapters are trained with PEFT, which is missing: pip install 'cogview[lora]'"]


def captions(folder: str, texts: list[str], save_image) -> None:
    for number, text in enumerate(texts):
        save_image(f"{folder}/{number}.png", number)
        if text:
            Path(f"{folder}/{number}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["", ""],
            "none of 2 entries of photos is a picture with a caption; put NAME.txt beside NAME.jpg",
        ),
        (["一只猫"], "one picture is too few: photos must have at least two different ones"),
        (
            ["一只猫", ""],
            "one picture is too few: photos must have at least two",
        ),
        (["猫", "猫 ", "　猫"], "all captions are the same, so that a model cannot learn which picture is meant: 猫"),
    ],
)
def test_new_refuses_what_cannot_be_learnt(new, save_image, texts, message):
    captions("photos", texts, save_image)
    status, out, err = new("mine", "--pictures", "photos")
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"cogview new: {message}")
    assert not Path("mine").exists()


def test_new_refuses_copies_of_one_picture(new, save_image):
    for number in range(3):
        save_image(f"photos/{number}.png", 1)
        Path(f"photos/{number}.txt").write_text(f"猫{number}", encoding="utf-8")
    status, _, err = new("mine", "--pictures", "photos")
    assert (status, len(err)) == (2, 1)
    assert "one picture is too few" in err[0]


def test_new_refuses_missing_and_empty_folders(new):
    assert "the source nothing does not exist" in new("mine", "--pictures", "nothing")[2][0]
    Path("empty").mkdir()
    status, _, err = new("mine", "--pictures", "empty")
    assert (status, len(err)) == (2, 1)
    assert "empty has no pictures, expected NAME.jpg beside NAME.txt" in err[0]
    assert "missing option '--pictures'" in new("mine")[2][0]


def test_new_keeps_an_existing_recipe(new, save_image):
    captions("photos", ["猫", "狗"], save_image)
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text("work: mine\n")
    status, _, err = new("mine", "--pictures", "photos")
    assert (status, len(err)) == (2, 1)
    assert "mine/recipe.yaml is there already: go on with cogview run mine/recipe.yaml" in err[0]
    assert Path("mine/recipe.yaml").read_text() == "work: mine\n"
    assert new("mine", "--pictures", "photos", "--overwrite")[0] == 0
    assert "transformer:" in Path("mine/recipe.yaml").read_text()


def test_new_looks_at_its_target_before_it_times_steps(new, save_image, monkeypatch):
    """Minutes of timing were lost to a target that cannot be written."""
    captions("photos", ["猫", "狗"], save_image)
    monkeypatch.setattr(new_model, "image_step_seconds", None)  # which a call would trip over
    Path("file").write_text("")
    Path("link").symlink_to("nowhere")
    Path("mine/recipe.yaml").mkdir(parents=True)
    for folder, message in (
        ("file", "the output folder file cannot be written: it is a file; choose another"),
        ("link", "the output folder link cannot be written: it is a link that leads nowhere; choose another"),
        ("mine", "mine/recipe.yaml is a folder; remove it, or choose another FOLDER"),
    ):
        status, _, err = new(folder, "--pictures", "photos")
        assert (status, err[-1]) == (2, f"cogview new: {message}")


def test_counts_of_all_steps_can_be_added_up(new, save_image, capsys):
    """``new`` counted a broken picture twice, as usable and as not, and no line said what it counted."""
    draw_pictures(Path("shapes"))
    Path("shapes/broken.png").write_bytes(b"nothing")
    Path("shapes/broken.txt").write_text("坏", encoding="utf-8")
    save_image("shapes/bare.png", 1)
    shutil.copy("shapes/00.png", "shapes/copy.png")
    shutil.copy("shapes/00.txt", "shapes/copy.txt")
    _, _, err = new("mine", "--pictures", "shapes", "--size", "tiny")
    assert "43 entries: 41 pictures with captions, 2 that cannot be used" in err
    assert "copies of other pictures among these, which the image tokenizer sees once: 1" in err
    assert main(["train-text", "mine/recipe.yaml", "held_out=0"]) == 0
    assert "43 records: 42 captions to train on, 0 held out by their text" in capsys.readouterr().err
    recipe = Recipe.open(Path("mine/recipe.yaml"))
    index = train_image._index_pictures(recipe, image_settings(recipe), resumes=False)
    training, held_out = len(index.training), len(index.held_out)
    assert (training + held_out, len(index.left_out)) == (41, 2)
    assert f"43 pictures: {training} to train on, {held_out} held out, 2 left out" in capsys.readouterr().err


def test_new_speaks_chinese(new, save_image):
    captions("photos", ["猫", "猫"], save_image)
    _, _, err = new("mine", "--pictures", "photos", "--language", "zh")
    assert err[0].startswith("cogview new: 所有描述都相同")
    save_image("photos/1.png", 5)
    Path("photos/1.txt").write_text("狗", encoding="utf-8")
    assert new("mine", "--pictures", "photos", "--language", "zh")[0] == 0
    text = Path("mine/recipe.yaml").read_text(encoding="utf-8")
    assert "# 由 cogview new 编写；可随意更改，然后运行\n#   cogview run mine/recipe.yaml\n" in text
    assert "# 2 张图片中的 1 张，模型从不看到，只用来衡量模型" in text
