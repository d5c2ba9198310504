"""Every command line of the README and of the documentation runs, slow ones with smaller settings.

``ROWS`` lists the command lines as the pages have them. A command line that is missing here, or that no page has any
more, fails the test.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.checkpoints.registry import ModelEntry, converted_folder, load_registry
from cogview.cli.main import main
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.evaluation.manifest import Manifest, ResultValue, write_result
from cogview.modeling import config
from cogview.pipeline.cogview import CogView
from tests.checkpoints.test_hub import TOKEN, hub  # noqa: F401  hub: the fake Hub

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/README.md"]
LAST = "runs/tiny/transformer-run/checkpoints/step-00000002"
TINY = (
    "num_layers=1 precision=float32 run.evaluate_every=0 run.save_every=1 training.batch_size=2 training.num_workers=0"
)

_FENCE = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(cogview [a-z-]+ [^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Run:
    """How a command line is run: what it needs, and the arguments that make it small."""

    needs: str = ""  # names of ``Workshop`` methods
    more: str = ""
    instead: str = ""  # arguments that replace those of the page


@dataclass(frozen=True)
class NotRun:
    """Why a command line is not run here."""

    reason: str


FRESH = NotRun("changes the environment; .ci/run runs it")
SYSTEM = NotRun("installs packages of the system or fetches the repository")
CLUSTER = NotRun("needs several machines or Slurm")

PACKAGES = NotRun("needs Debian packages; tests/scripts has small ones")
NEW = NotRun("times steps and trains; tests/cli/test_new.py runs it with tiny settings")

DECODER = NotRun("tests/training/test_vqvae_initial.py and test_vqvae_processes.py have such trainings")

ROWS: dict[str, Run | NotRun] = {
    # README, quickstart
    'pip install ".[test]" && pytest -m "not slow" -n auto --dist loadfile': FRESH,
    "python3 -m venv .venv && . .venv/bin/activate": FRESH,
    "pip install .": FRESH,
    'pip install ".[train]"': FRESH,
    'pip install ".[train,lora]"': FRESH,
    "git clone REPOSITORY cogview && cd cogview": SYSTEM,
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": SYSTEM,
    "apt-get install fonts-noto-color-emoji unicode-cldr-core unicode-data": SYSTEM,
    "cogview run emoji-cpu": NotRun("takes hours; tests/cli/test_recipe_commands.py runs it with a tiny recipe"),
    'cogview generate "一只猫" -n 4 --grid': Run(),
    'cogview generate "一只猫" --seed 7': Run(),
    'cogview generate "一只猫" --adapter FOLDER': Run("adapter", instead="--adapter ADAPTER"),
    "cogview generate --input prompts.jsonl --resume": Run(),
    "cogview train RECIPE --resume auto": Run("recipe"),
    "cogview push FOLDER owner/name": Run("hub"),
    "cogview info cogview-emoji --things": Run(),
    'cogview generate "一个红苹果" "左边是狐狸，右边是苹果" -n 4 --seed 7 --grid': Run(),
    "cogview caption outputs/": Run(),
    'cogview rerank --prompt "一个红苹果" outputs/': Run(),
    'cogview upscale outputs/一个红苹果-seed7-0.png --prompt "一个红苹果"': Run(),
    'cogview complete outputs/一个红苹果-seed7-0.png --rows 4 --prompt "一个红苹果"': Run(),
    # Generation
    'cogview generate "蓝色背景上的三只狐狸"': Run(),
    "cogview generate": Run(),
    'cogview generate "一个红苹果" --guidance 2': Run(),
    'cogview generate "一个红苹果" --guidance 2 --negative "一只狗"': Run(),
    'cogview generate "一个红苹果" --text-attention 1.5': Run(),
    'cogview generate "一个红苹果" -n 16 --keep 4': Run(more="--max-inference-batch-size 16"),
    "cogview caption pictures/": Run(),
    "cogview caption pictures/ -n 3 --method beam": Run(),
    'cogview rerank --prompt "一个红苹果" pictures/*.png': Run(),
    'cogview upscale picture.png --prompt "一个红苹果"': Run(),
    'cogview upscale small.png --prompt "一个红苹果" --low-level': Run(),
    'cogview upscale large.png --prompt "一个红苹果" --tiles': Run(),
    'cogview complete picture.png --rows 4 --prompt "一个红苹果" -n 4': Run(),
    'cogview edit picture.png "把苹果变成绿色" --model EDITOR': Run(),
    'cogview edit picture.png "把苹果变成绿色" --mask 0,0,32,64 --model EDITOR': Run(),
    'cogview edit picture.png "把苹果变成绿色" --strength 0.5 --model EDITOR': Run(),
    'cogview complete picture.png --mask mask.png --prompt "一个红苹果" --model EDITOR': Run(),
    "cogview vary picture.png --keep 0.7 -n 4 --model EDITOR": Run(),
    "cogview generate --input prompts.jsonl -o pictures": Run(),
    "cogview generate --input prompts.jsonl -o pictures --resume": Run(),
    "torchrun --nproc-per-node 8 --no-python cogview generate --input prompts.jsonl -o pictures": Run(
        more="--model TINY --device cpu"
    ),
    # Adapters
    "cogview train scripts/recipes/lora-style.yaml": Run(
        "style", more=f"training.steps=2 training.warmup_steps=1 {TINY} num_layers=2"
    ),
    "cogview train lora-style --resume auto": NotRun("the command above runs its recipe"),
    'cogview generate "一个红苹果" --adapter runs/lora-style/transformer-run/checkpoints/step-00001000': Run(
        "adapter", instead="--adapter ADAPTER"
    ),
    'cogview generate "一个红苹果" --adapter style:0.6 --adapter things': Run(
        "adapter", instead=f"--adapter {LAST}:0.6 --adapter ADAPTER"
    ),
    "cogview estimate --train --model 4b --lora 16 --zero 2 --checkpointing full --device cuda:24GB": Run(),
    "cogview adapter info ADAPTER": Run("adapter"),
    "cogview adapter merge MODEL ADAPTER -o FOLDER": Run("adapter", instead="MODEL ADAPTER -o merged"),
    "cogview adapter unmerge MODEL ADAPTER -o FOLDER": Run("adapter merged", instead="merged ADAPTER -o unmerged"),
    # CogView v1
    "cogview convert cogview-base.tar --image-tokenizer vqvae_hard_biggerset_011.pt --text-model cog-pretrain.model "
    "--verify": Run("v1"),
    'cogview generate "一只可爱的小猫坐在窗台上" --model cogview-base --dtype int8': Run("v1 converted"),
    "cogview convert FOLDER --to v1 -o OUT": Run("v1 converted", instead="CONVERTED --to v1 -o OUT"),
    "cogview models": Run(),
    "cogview download cogview-released": NotRun("needs the network; tests/cli/test_download.py has a server"),
    "cogview info cogview-base.tar": Run("v1"),
    "cogview estimate --model 4b --task generate -n 8 --dtype int8 --device cuda:24GB": Run(),
    # Data
    "cogview data build pictures -o data/style --model cogview-emoji": Run("captions", more="--workers 0 --held-out 0"),
    "cogview data build captions.csv --pictures photos -o data/photos --model cogview-emoji --fit pad": Run(
        "captions", more="--workers 0"
    ),
    "apt-get install tuxpaint-stamps-default pysiogame gcompris-qt-data iso-flags-png-320x240 iso-codes "
    "unicode-cldr-core librsvg2-bin": SYSTEM,
    "python scripts/real_pictures.py pictures/real": PACKAGES,
    "cogview run real-pictures": PACKAGES,
    "python scripts/benchmarks/own_pictures.py real-pictures": PACKAGES,
    "cogview new mine --pictures pictures": NEW,
    "cogview run mine/recipe.yaml": NEW,
    "cogview run mine/recipe.yaml image.training.steps=200 transformer.training.steps=300": NEW,
    "cogview run mine/recipe.yaml transformer.training.steps=1350": NEW,
    'cogview generate "狐狸" --model mine/model': Run(instead="--model TINY"),
    "cogview new style --pictures pictures --adapter-for cogview-emoji": NEW,
    "cogview run style/recipe.yaml": NEW,
    'cogview generate "一个红苹果" --adapter style/adapter': Run("adapter", instead="--adapter ADAPTER"),
    "cogview train-image own.yaml train=decoder init_from=cogview-emoji --work runs/decoder": DECODER,
    'cogview generate "狐狸" --model runs/decoder/tuned-model': Run(instead="--model TINY"),
    "torchrun --nproc-per-node 2 --no-python cogview train-image own.yaml --resume auto": DECODER,
    "npm pack @iconify-json/fluent-emoji-flat@1.2.6 && tar xf iconify-json-fluent-emoji-flat-1.2.6.tgz": SYSTEM,
    "pip install resvg-py==0.5.0": FRESH,
    "npm pack @iconify-json/twemoji @iconify-json/fluent-emoji-flat @lobehub/fluent-emoji-3d": SYSTEM,
    "apt-get install fonts-noto-cjk fonts-lxgw-wenkai": SYSTEM,
    **dict.fromkeys(
        (
            "python scripts/emoji_sprites.py twemoji/package -o runs/sprites/twemoji",
            "python scripts/emoji_sprites.py fluent-emoji-flat/package -o runs/sprites/fluent-flat",
            "python scripts/emoji_sprites.py fluent-emoji-3d/package -o runs/sprites/fluent-3d",
        ),
        NotRun("tests/scripts/test_emoji_sprites.py has a package"),
    ),
    "python scripts/emoji_sprites.py package -o sprites": NotRun("tests/scripts/test_emoji_sprites.py has a package"),
    "cogview run emoji-style": NotRun("needs the sprites; tests/emoji/test_export.py has three"),
    'cogview generate "一只狐狸，紫色背景" --model runs/emoji-style/model': Run(instead="--model TINY"),
    "cogview train-image own.yaml --resume auto": Run("own", more="--device cpu"),
    "cogview eval image-tokenizer cogview-emoji pictures --fit pad -o sheet.png": Run(),
    # evaluation
    "cogview eval images generated true": Run(needs="picture_sets", more="--network stub"),
    "cogview eval images generated true --network inception "
    "--weights weights-inception-2015-12-05-6726825d.pth": NotRun(
        "needs the weights; tests/evaluation/test_features.py has a small network"
    ),
    "cogview eval images generated true --pairs": Run(needs="picture_sets"),
    "cogview eval benchmark geneval --prompts evaluation_metadata.jsonl -o geneval": Run(
        needs="geneval", more="--subset --samples 1 --device cpu"
    ),
    "cogview eval benchmark geneval --prompts evaluation_metadata.jsonl --detections detections.jsonl -o geneval": Run(
        needs="geneval", more="--subset --samples 1"
    ),
    "cogview eval benchmark coco-30k --prompts captions.tsv -o coco --reference true-pictures": NotRun(
        "needs generated pictures; tests/cli/test_evaluate_benchmark.py runs it"
    ),
    "cogview eval text-in-pictures expected.tsv": NotRun("needs rapidocr; tests/cli/test_evaluate_reading.py runs it"),
    "cogview eval model MODEL --store HELD_OUT_STORE -o result.json": Run(
        "recipe", instead="model TINY --store held-out --pairs 0 --device cpu"
    ),
    "cogview eval model MODEL --prompts prompts.txt --images 8 --rank-by picture -o result.json": Run(
        more="--images 2 --device cpu"
    ),
    "cogview eval model MODEL --pictures HELD_OUT_PICTURES -o result.json": Run(
        needs="picture_sets", instead="model TINY --pictures true --network stub --device cpu"
    ),
    "cogview eval gate cogview-emoji": NotRun("takes minutes; tests/cli/test_evaluate_gate.py runs it"),
    "cogview eval compare a.json b.json -o page.html": Run(needs="results"),
    "cogview eval text captions.tsv references.tsv": Run(needs="texts", more="--by characters"),
    "python examples/train_on_images.py pictures --steps 2000 -o runs/pictures": NotRun(
        "tests/test_examples.py runs it with few steps"
    ),
    'cogview generate "红色天空下的蓝色山" --model runs/pictures/transformer-run/checkpoints/step-00002000': Run(
        instead="--model TINY"
    ),
    "cogview train pictures.yaml --work runs/pictures-large": Run("recipe", instead="tiny.yaml --work runs/large"),
    "cogview data inspect data/style --model cogview-emoji -n 32 -o sheet.png": Run("built"),
    "cogview data stats data/style --model cogview-emoji": Run("built"),
    "cogview data validate data/style data/style-held-out": Run("built"),
    "cogview data merge data/style data/photos -o data/all": Run("built"),
    "cogview data export data/style --model cogview-emoji -o shards": Run("built"),
    "cogview import-data SOURCE --model FOLDER -o STORE": NotRun("tests/cli/test_import_data.py makes such a source"),
    # Hub
    'cogview generate "一只狐狸" --model studio/fox': Run("hub"),
    'cogview generate "一只狐狸" --model studio/fox --revision v1.0': Run("hub"),
    'cogview generate "一只狐狸" --model studio/fox --adapter studio/fox-in-ink': Run("hub adapter published"),
    "cogview info studio/fox": Run("hub"),
    "cogview download studio/fox": Run("hub"),
    "cogview push models/fox studio/fox --private": Run("hub"),
    'cogview push models/fox studio/fox --revision next --commit-message "Train for 20,000 more steps"': Run("hub"),
    # Training
    "cogview train scripts/recipes/emoji-cpu.yaml training.steps=100 run.save_every=50": Run(
        "emoji", more=f"training.steps=2 training.warmup_steps=1 {TINY}"
    ),
    "torchrun --nproc-per-node 2 --no-python cogview train RECIPE --resume auto": Run(
        "recipe", more="--device cpu preset=5m num_layers=1"
    ),
    "deepspeed --hostfile HOSTS --module cogview train RECIPE --resume auto": CLUSTER,
    "sbatch --nodes 64 scripts/recipes/slurm.sh scripts/recipes/4b-512-gpus.yaml": CLUSTER,
    "cogview train RECIPE --init-from MODEL": Run("recipe", more="num_layers=2"),
    "cogview runs runs": Run("trained"),
    "cogview runs runs --compare": Run("trained"),
    "cogview runs runs --plot curves.png": Run("trained"),
    "cogview estimate --train": Run(),
    "cogview estimate --train --model 4b --gpus 8 --zero 2 --device cuda:80GB": Run(),
    "cogview doctor scripts/recipes/4b-8-gpus.yaml": Run("recipe", instead="tiny.yaml --device cpu"),
    # Examples
    "python examples/generate_images.py 一个红苹果 -n 4 --seed 7": NotRun("tests/test_examples.py runs it"),
}


def commands_of_pages() -> Iterator[str]:
    """Yield every command line: those of fenced blocks, and commands with arguments in the prose of the README."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in _FENCE.findall(text):
            lines = block.replace("\\\n", " ").splitlines()
            yield from filter(None, (" ".join(re.sub(r"\s+#.*$", "", line).split()) for line in lines))
        if page.name.startswith("README"):
            yield from _INLINE.findall(_FENCE.sub("", text))


COMMANDS = list(dict.fromkeys(commands_of_pages()))
RUN = [line for line in COMMANDS if isinstance(ROWS.get(line), Run)]


def test_commands_of_pages_are_listed_once() -> None:
    assert sorted(COMMANDS) == sorted(ROWS)


@dataclass
class Workshop:
    """A folder in which the command lines are run, with the files that they read."""

    tiny: Path
    kept: Path  # a folder for what several tests need
    request: pytest.FixtureRequest
    monkeypatch: pytest.MonkeyPatch

    def prepare(self, save_image: Callable[..., object]) -> None:
        """Write images, prompts and earlier results."""
        for name in ("pictures/a.png", "pictures/b.png", "outputs/一个红苹果-seed7-0.png", "picture.png"):
            save_image(name)
        save_image("small.png", size=(32, 32))
        Image.fromarray(np.arange(64)[None].repeat(64, axis=0) < 32).save("mask.png")
        save_image("large.png", size=(80, 64))
        Path("prompts.jsonl").write_text('{"prompt": "一只狐狸"}\n{"prompt": "一个红苹果", "n": 2}\n', encoding="utf-8")
        Path("prompts.txt").write_text("一只狐狸\n一个红苹果\n", encoding="utf-8")
        for name in ("scripts", "examples"):
            Path(name).symlink_to(ROOT / name)

    def own(self) -> None:
        """Write a recipe of an image tokenizer for pictures of many colours."""
        for number in range(12):
            path = Path("coloured", f"{number}.png")
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (20 * number, 99, 0)).save(path)
        image = {
            "pictures": ["coloured"],
            "side": 32,
            "held_out": 0.3,
            "precision": "float32",
            "model": {"channels": [4, 8, 8], "encoder_blocks": [0, 0, 1], "num_codes": 16, "code_width": 4},
            "training": {"steps": 2, "batch_size": 2, "warmup_steps": 1},
        }
        Path("own.yaml").write_text(yaml.safe_dump({"work": "runs/own", "image": image}), encoding="utf-8")

    def captions(self) -> None:
        """Write captions beside the pictures, and a table of them."""
        for name in "ab":
            Path(f"pictures/{name}.txt").write_text(f"一只狐狸{name}", encoding="utf-8")
        Path("captions.csv").write_text("file,caption\na.png,一只狐狸\nb.png,一只狗\n", encoding="utf-8")
        Path("photos").symlink_to("pictures")

    def geneval(self) -> None:
        """Write a prompt of GenEval, and detections of its picture."""
        item = {"tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "一个红苹果"}
        Path("evaluation_metadata.jsonl").write_text(json.dumps(item), encoding="utf-8")
        apple = {"class": "apple", "score": 0.9, "box": [1, 1, 9, 9]}
        found = {"filename": "geneval/pictures/00000/samples/0000.png", "detections": [apple]}
        Path("detections.jsonl").write_text(json.dumps(found), encoding="utf-8")

    def results(self) -> None:
        """Write two results of the same measure."""
        for name, value in (("a", 27.0), ("b", 28.0)):
            results = {"psnr": ResultValue(value=value, low=value - 1, high=value + 1, n=10, unit="dB")}
            write_result(Path(f"{name}.json"), Manifest(measure="upscale"), results)

    def picture_sets(self) -> None:
        """Write pictures that are measured against others."""
        for name, shade in (("generated", 90), ("true", 99)):
            Path(name).mkdir()
            for number in range(5):
                Image.new("RGB", (32, 32), (50 * number, shade, 0)).save(Path(name, f"{number}.png"))

    def texts(self) -> None:
        """Write texts and their references."""
        Path("captions.tsv").write_text("id\ttext\na\t一只狐狸\nb\t一只狗\n", encoding="utf-8")
        references = "id\ttext\na\t一只红狐狸\na\t狐狸\nb\t一只小狗\n"
        Path("references.tsv").write_text(references, encoding="utf-8")

    def built(self) -> None:
        """Build the stores of the pages."""
        self.captions()
        for name in ("style", "style-held-out", "photos"):
            options = ["--model", str(self.tiny), "--device", "cpu", "--workers", "0", "--held-out", "0"]
            assert main(["data", "build", "pictures", "-o", f"data/{name}", *options]) == 0

    def once(self, make: Callable[[], None]) -> None:
        """Let ``make`` write its files for the first test that needs them, and copy them into the current folder."""
        kept = self.kept / make.__name__
        if not kept.exists():
            kept.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(kept)
                make()
        shutil.copytree(kept, Path(), dirs_exist_ok=True)

    def recipe(self) -> None:
        """Write a store of random codes, and ``tiny.yaml``, which trains on it."""
        self.once(self.write_recipe)

    def write_recipe(self) -> None:
        model = CogView.from_pretrained(self.tiny, device="cpu")
        generator = np.random.default_rng(0)
        text = model.text_tokenizer
        header = StoreHeader(
            fields={"text": 20, "image": 64, "large": 256, "named": 64},
            grid=8,
            num_image_codes=model.config.vocabulary.num_image_codes,
            num_text_pieces=text.size,
            layouts=("generate", "caption", "upscale"),
            codebook_sha256=codebook_hash(model.image_tokenizer),
            text_sha256=hashlib.sha256(text.model_bytes).hexdigest(),
        )
        for path in ("store", "held-out"):
            with StoreWriter(path, header) as writer:
                texts = pad_text([text.encode("红色背景上的狐狸")] * 8, 20)
                rows = {name: generator.integers(0, 40, (8, width)) for name, width in header.fields.items()}
                writer.append({name: codes.astype(np.uint16) for name, codes in rows.items()} | {"text": texts})
        recipe = {
            "preset": "tiny",
            "max_positions": 96,
            "tokenizers": str(self.tiny),
            "store": "store",
            "validation_store": "held-out",
            "training": {"steps": 2, "batch_size": 2, "warmup_steps": 1, "tasks": {"generate": 1}},
            "run": {"log_every": 1, "save_every": 1, "evaluate_every": 0},
            "precision": "float32",
        }
        Path("tiny.yaml").write_text(yaml.safe_dump({"work": "runs/tiny", "transformer": recipe}), encoding="utf-8")

    def trained(self) -> None:
        """Train a run, and copy it."""
        self.once(self.train_twice)

    def train_twice(self) -> None:
        self.recipe()
        assert main(["train", "tiny.yaml", "--device", "cpu"]) == 0
        shutil.copytree("runs/tiny", "runs/other")

    def style(self) -> None:
        """Put the store where the recipe of an adapter reads it."""
        pytest.importorskip("peft")
        self.recipe()
        shutil.move("store", "data/style")
        shutil.move("held-out", "data/style-held-out")

    def adapter(self) -> None:
        """Train an adapter."""
        pytest.importorskip("peft")
        self.once(self.train_adapter)

    def train_adapter(self) -> None:
        self.recipe()
        start = [f"init_from={self.tiny}", "lora={rank: 2}", "num_layers=2"]
        assert main(["train", "tiny.yaml", "--device", "cpu", *start]) == 0

    def merged(self) -> None:
        """Merge the adapter."""
        assert main(["adapter", "merge", str(self.tiny), LAST, "-o", "merged"]) == 0

    def emoji(self) -> None:
        """Put stores and tokenizers where the emoji recipe reads them."""
        self.recipe()
        work = Path("runs/emoji-cpu")
        shutil.copytree(self.tiny / "image", work / "image")
        shutil.copy(self.tiny / "text.model", work / "text.model")
        shutil.move("store", work / "store")
        shutil.move("held-out", work / "held-out-store")

    def v1(self) -> None:
        """Write the files of a small model of CogView v1 under their published names."""
        files = self.request.getfixturevalue("small_release").write(Path(), half=True)
        files["image_tokenizer"].rename("vqvae_hard_biggerset_011.pt")
        files["text_model"].rename("cog-pretrain.model")
        shutil.make_archive("cogview-base", "tar", files["source"])

    def converted(self) -> None:
        """Convert these files."""
        line = "cogview-base.tar --image-tokenizer vqvae_hard_biggerset_011.pt --text-model cog-pretrain.model"
        assert main(["convert", *line.split()]) == 0

    def hub(self) -> None:
        """Publish the tiny model on a fake Hub, in all branches that the pages name."""
        server = self.request.getfixturevalue("hub")
        self.monkeypatch.setenv("HF_TOKEN", TOKEN)
        for branch in ("main", "v1.0"):
            server.add("studio/fox", self.tiny, branch=branch)
        shutil.copytree(self.tiny, "models/fox")

    def published(self) -> None:
        """Publish the adapter."""
        self.request.getfixturevalue("hub").add("studio/fox-in-ink", Path(LAST))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the files that several tests need."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def workshop(
    tiny_checkpoint: Path,
    kept: Path,
    save_image: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Workshop:
    """Return a workshop in an empty folder, with the tiny model as ``cogview-emoji``."""
    rows = {**load_registry(), "cogview-emoji": ModelEntry(about="", licence="", embedded=str(tiny_checkpoint))}
    monkeypatch.setattr("cogview.checkpoints.registry.load_registry", lambda: rows)
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    monkeypatch.setitem(config.PRESETS, "5m", (1, 32, 2))
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shop = Workshop(tiny_checkpoint, kept, request, monkeypatch)
    shop.prepare(save_image)
    return shop


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("line", RUN)
def test_commands_of_pages_run(line: str, workshop: Workshop, monkeypatch, capfd) -> None:
    row = ROWS[line]
    assert isinstance(row, Run)
    for need in row.needs.split():
        getattr(workshop, need)()
    before, _, command = line.partition("cogview ") if line != "cogview generate" else ("", "", "generate")
    words = shlex.split(command)
    if row.instead:
        kept = 2 if words[0] == "adapter" or words[0] == "generate" else 1
        words = [*words[:kept], *shlex.split(row.instead)]
    named = {
        "TINY": str(workshop.tiny),
        "MODEL": str(workshop.tiny),
        "EDITOR": str(workshop.request.getfixturevalue("edit_checkpoint")),
        "FOLDER": str(workshop.tiny),
        "RECIPE": "tiny.yaml",
    }
    named |= {"ADAPTER": LAST, "CONVERTED": str(converted_folder("cogview-base"))}
    words = [named.get(word, word) for word in [*words, *shlex.split(row.more)]]
    words = [part for word in words for part in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    terminal = io.StringIO("一只猫\n\n")  # what `cogview generate` is given
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    if before.startswith("torchrun"):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--module", "cogview"]
        result = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=180)
        assert result.returncode == 0, result.stderr
    else:
        assert main(words) == 0, capfd.readouterr().err
    assert "Traceback" not in capfd.readouterr().err


def test_commands_of_pages_start_a_valid_slurm_script() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts/recipes/slurm.sh")], check=True)
