"""Protocols of a rich world: planted models are graded exactly, and captions leave open what they may."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.checkpoint import NamedThing
from cogview.emoji.attributes import BOARDS, STYLES, TYPEFACES, Sign
from cogview.emoji.edits import changed_cells
from cogview.emoji.evaluation import gate, scenes
from cogview.emoji.evaluation.edits import held_out_edits, kept_codes
from cogview.emoji.evaluation.gate import GateSettings, _open_prompts, measure_group
from cogview.emoji.evaluation.groups import groups_of
from cogview.emoji.evaluation.judge import grader_judge
from cogview.emoji.evaluation.results import scenes_values
from cogview.emoji.evaluation.rich_captions import RichCaptionGrader, make_caption_grader
from cogview.emoji.evaluation.scenes import RICH_PARTS, evaluate_scenes, format_report, held_out_scenes
from cogview.emoji.evaluation.similar_captions import similar_captions
from cogview.emoji.rich_grades import RichGrader
from cogview.emoji.rich_reader import RichReader
from cogview.emoji.scene import COLOURS, Scene, is_style_held_out, is_text_held_out
from cogview.emoji.settings import CaptionRates
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.modeling.config import Sampling
from cogview.pipeline.results import GeneratedImage
from cogview.vqvae.model import VQVAE, VQVAEConfig

BLUE = COLOURS[5]
SAMPLING = Sampling()


class Mirror(VQVAE):
    """Image tokenizer that restores its last images exactly."""

    def __init__(self) -> None:
        super().__init__(VQVAEConfig(channels=(4, 4, 4), num_codes=64))
        self.seen = torch.empty(0)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return torch.arange(len(images)).view(-1, 1, 1).expand(-1, 8, 8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.seen


class Editor:
    """Generates true images but for every fourth, and leaves the source as it is in every third edit."""

    name = "editor"

    def __init__(self, world: EmojiWorld, count: int, seed: int, tasks: tuple[str, ...] = ("generate", "edit")) -> None:
        self.config = SimpleNamespace(grid=8, tasks=tasks)
        self.things = tuple(NamedThing(name=thing.name) for thing in world.things)
        self.image_tokenizer = Mirror()
        self.seed = seed
        self.images = [world.render(scene) for scene, _ in held_out_scenes(world, count, seed)]
        self.edits = [
            (text, *(world.render(scene) for scene in (edit.source, edit.result)))
            for edit, text in held_out_edits(world, count, seed)
        ]

    def encode_images(self, images):
        return np.stack([self.codes_of(np.asarray(image)) for image in images])

    @staticmethod
    def codes_of(pixels: np.ndarray) -> np.ndarray:
        """Return a code for each cell, which differ wherever the pixels do."""
        cells = pixels.reshape(8, 8, 8, 8, 3).swapaxes(1, 2)
        return np.array([[hash(cell.tobytes()) for cell in row] for row in cells])

    def run(self, requests):
        for request in requests:
            number = request.seed - self.seed
            if request.task == "edit":
                text, source, result = self.edits[number]
                assert text == request.prompt
                assert np.array_equal(request.codes, self.codes_of(source))
                pixels = source if number % 3 == 0 else result
            else:
                pixels = np.full_like(self.images[number], 160) if number % 4 == 0 else self.images[number]
            yield GeneratedImage.from_pixels(pixels, request, self.codes_of(pixels), 0.0)


@pytest.fixture
def world(distinct_world: EmojiWorld) -> EmojiWorld:
    return distinct_world


def test_evaluate_scenes_reports_groups_and_edits_of_a_rich_world(world, monkeypatch):
    monkeypatch.setattr(scenes, "TOKENIZER_IMAGES", 4)
    report, images = evaluate_scenes(Editor(world, 60, 7), world, count=60, seed=7, sampling=SAMPLING, batch_size=16)
    asked = held_out_scenes(world, 60, 7)
    assert (report["drawn"]["everything"]["right"], report["drawn"]["everything"]["of"]) == (45, 60)
    assert report["ceiling_true_scenes"]["everything"]["accuracy"] == 1
    assert tuple(part for part in report["drawn"] if part in RICH_PARTS) == RICH_PARTS
    assert report["drawn"]["characters"]["of"] == sum(scene.sign is not None for scene, _ in asked)
    groups = report["groups"]["drawn"]
    for group, found in groups.items():
        numbers = [number for number, (scene, _) in enumerate(asked) if group in groups_of(scene)]
        assert (found["right"], found["of"]) == (sum(number % 4 > 0 for number in numbers), len(numbers))
    assert len(groups) > 10
    edits = report["edits"]
    assert (edits["drawn"]["everything"]["right"], edits["drawn"]["unchanged"]["right"]) == (40, 20)
    assert sum(found["of"] for found in edits["drawn"]["kinds"].values()) == 60
    assert edits["ceiling_reconstructions"]["everything"]["accuracy"] == 1
    assert edits["kept_codes"]["value"] == 1
    assert len(report["items"]["ids"]) == len(report["items"]["labels"]) == len(images) == 120
    assert all(len(values) == 120 for values in report["items"]["values"].values())
    assert report["items"]["values"]["edits.everything"] == [None] * 60 + [float(n % 3 > 0) for n in range(60)]
    lines = format_report(report).splitlines()
    assert "| everything right | generated images | VQ-VAE's reconstructions | true scenes |" in lines
    assert any(line.startswith("| style (of ") for line in lines)
    assert any(line.startswith("| all (of 60) | 66.7%") for line in lines)
    assert any(line.startswith("Codes kept outside of the change: 100.0% (100.0%–100.0%). Still") for line in lines)
    values, _ = scenes_values(report)
    assert values["edits.generated.everything"].value == pytest.approx(2 / 3)
    assert values["edits.kept_codes"].n == 60
    assert {"generated.style", "generated.characters", "generated.row", "reconstructions.row"} <= set(values)


def test_evaluate_scenes_leaves_edits_out_of_a_model_without_them(world, monkeypatch):
    monkeypatch.setattr(scenes, "TOKENIZER_IMAGES", 4)
    model = Editor(world, 8, 0, ("generate",))
    report, images = evaluate_scenes(model, world, count=8, seed=0, sampling=SAMPLING, batch_size=8)
    assert "edits" not in report
    assert len(images) == len(report["items"]["ids"]) == 8


def test_groups_name_what_is_held_out_beside_the_content(world):
    groups = {group for scene, _ in held_out_scenes(world, 300, 1) for group in groups_of(scene)}
    assert {"held-out styles of objects", "held-out pairs of characters"} <= groups
    for scene, _ in held_out_scenes(world, 100, 2):
        found = groups_of(scene)
        assert found[0] == scene.kind
        styled = any(is_style_held_out(thing, scene.style) for thing in scene.things)
        assert ("held-out styles of objects" in found) == styled
        written = scene.sign is not None and is_text_held_out(scene.sign.text)
        assert ("held-out pairs of characters" in found) == written


def test_held_out_edits_differ_and_are_a_function_of_the_seed(world):
    asked = held_out_edits(world, 50, 3)
    assert asked == held_out_edits(world, 50, 3)
    assert len({edit.meaning for edit, _ in asked}) == 50
    assert all(edit.held_out for edit, _ in asked)
    assert asked[:20] == held_out_edits(world, 20, 3)


def test_kept_codes_counts_cells_where_the_edit_changes_no_pixel(world):
    edit = next(edit for edit, _ in held_out_edits(world, 50) if 0 < changed_cells(world, edit).sum() < 64)
    changed = changed_cells(world, edit)
    codes = np.arange(256).reshape(16, 16)
    after = codes.copy()
    after[changed.repeat(2, axis=0).repeat(2, axis=1)] += 1000
    assert kept_codes(world, edit, codes, after) == 1
    row, column = np.argwhere(~changed)[0]
    after[2 * row, 2 * column] += 1000
    assert kept_codes(world, edit, codes, after) == pytest.approx(1 - 1 / (256 - 4 * changed.sum()))
    with pytest.raises(InputError, match="a grid that is a multiple of 8, got 12"):
        kept_codes(world, edit, codes[:12, :12], after[:12, :12])


def test_gate_rows_of_a_rich_world_have_style_characters_and_edits(world):
    settings, grader = GateSettings(prompts=24, seed=5, batch_size=8), RichGrader(world)
    model = Editor(world, 24, 5)
    rows = measure_group("images", model, grader, SAMPLING, settings, limit=1.0)
    assert list(rows) == [*RICH_PARTS, "clean"]
    assert sum(rows["everything"].values()) == 18
    assert rows["clean"] == rows["everything"]  # the grey of wrong images is no background
    assert 0 < len(rows["characters"]) < 24
    edits = measure_group("edits", model, grader, SAMPLING, settings, limit=1.0)
    assert {name: sum(row.values()) for name, row in edits.items()} == {"edits": 16, "kept codes": 24}
    assert gate.gate_groups(model, world) == ("images", "diversity", "edits")
    assert gate.gate_groups(model) == ("images", "diversity")


def test_open_prompts_of_a_rich_world_name_no_background(world, make_rich_world):
    asked = held_out_scenes(world, 24)
    prompts = _open_prompts(world, asked)
    assert len(prompts) > 10
    reader = RichReader(world.things, world.colours, world.traditional)
    assert all(parsed.colour is None for prompt in prompts for parsed in reader.parses(prompt))
    named = make_rich_world(captions=CaptionRates(open_colour=0))
    assert _open_prompts(named, held_out_scenes(named, 24)) == []


def test_similar_captions_of_a_rich_world_describe_other_scenes(world):
    grader = make_caption_grader(world)
    for scene, _ in held_out_scenes(world, 80, 4):
        right, *others = similar_captions(world, scene, 0)
        assert right == world.caption(scene, 0, complete=True)
        assert grader.grade(right, scene).everything
        assert others
        for text in others:
            assert grader.grade(text, scene).parsed is not None
            assert not grader.grade(text, scene).everything


def test_rich_caption_grader_names_the_wrong_part(world):
    fox = world.things[1]
    grader = make_caption_grader(world)
    assert isinstance(grader, RichCaptionGrader)
    sign = Sign(text="福", board=BOARDS[0], typeface=TYPEFACES[1])
    scene = Scene(colour=BLUE, kind="label", things=(fox,), style=STYLES[2], sign=sign)

    def verdicts(text: str) -> dict[str, bool | None]:
        grade = grader.grade(text, scene)
        return {name: verdict for name, verdict in grade.parts.items() if verdict is not None} | {
            "everything": grade.everything
        }

    right = {"object": True, "relation": True, "characters": True, "everything": True}
    assert verdicts("狐狸下面的牌子上写着“福”") == right
    assert verdicts("狐狸下面的牌子上写着“春”") == {**right, "characters": False, "everything": False}
    assert verdicts("狗下面的牌子上写着“福”") == {**right, "object": False, "relation": False, "everything": False}
    assert verdicts("狐狸下面的黄色牌子上写着“福”") == {**right, "colour": False, "everything": False}
    assert verdicts("狐狸，扁平风格") == {"object": True, "style": True, "everything": False}
    wrong = dict.fromkeys(("colour", "object", "relation", "style", "characters", "everything"), False)
    assert verdicts("无法理解") == wrong
    assert grader.grade("狗下面的牌子上写着“福”", scene).confusions() == [("狐狸", "狗")]


def test_grader_judge_of_a_rich_world_leaves_open_what_the_prompt_does(world):
    fox, dog = world.things[1:3]
    prompts = {1: "狐狸和狗", 2: "三只扁平风格的狐狸"}
    judge = grader_judge(world, prompts, Path("prompts.txt"))
    shown = Scene(colour=BLUE, kind="above", things=(dog, fox), style=STYLES[3])
    many = Scene(colour=BLUE, kind="many", things=(fox,), count=3, style=STYLES[3])

    def judged(scene: Scene, prompt: str) -> list[float]:
        image = Image.fromarray(world.render(scene))
        image.prompt = prompt
        return judge.values_of([image])

    assert judged(shown, prompts[1]) == [1.0]
    assert judged(many, prompts[1]) == [0.0]
    assert judged(many, prompts[2]) == [0.0]
    assert judged(replace(many, style=STYLES[2]), prompts[2]) == [1.0]
    with pytest.raises(InputError, match="line 1: the grader cannot judge “无法理解”"):
        grader_judge(world, {1: "无法理解"}, Path("prompts.txt"))
