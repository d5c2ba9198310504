"""Protocol of ``cogview eval scenes``: planted painters are graded exactly, beside upper bounds."""

# B batch, H W pixels

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cogview.checkpoints.checkpoint import NamedThing
from cogview.config_io import to_mapping
from cogview.emoji.evaluation import scenes as module
from cogview.emoji.evaluation.scenes import (
    check_world,
    evaluate_scenes,
    format_report,
    held_out_scenes,
    num_held_out_scenes,
    summarize_images,
    tune_sampling,
)
from cogview.emoji.grader import SceneGrader
from cogview.emoji.scene import COLOURS, Scene, SceneWeights
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.harness import TUNING_SEED
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.vqvae.model import VQVAE, VQVAEConfig

BLUE, WHITE = COLOURS[5], COLOURS[10]


class Mirror(VQVAE):
    """Image tokenizer whose codes number its last images: it restores them exactly, or all to grey."""

    def __init__(self, *, grey: bool = False) -> None:
        super().__init__(VQVAEConfig(channels=(4, 4, 4), num_codes=64))
        self.grey = grey
        self.seen = torch.empty(0)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return torch.arange(len(images)).view(-1, 1, 1).expand(-1, 8, 8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.full_like(self.seen, 0.62) if self.grey else self.seen


class Painter:
    """Generates a right image if ``knows(number, sampling)``, else a grey one."""

    name = "painter"

    def __init__(self, world, count, seed, knows, *, grey: bool = False) -> None:
        self.config = SimpleNamespace(grid=8)
        self.things = tuple(NamedThing(name=thing.name) for thing in world.things)
        self.image_tokenizer = Mirror(grey=grey)
        self.knows = knows
        asked = held_out_scenes(world, count, seed)
        self.images = {caption: (i, world.render(scene, i)) for i, (scene, caption) in enumerate(asked)}
        self.batches: list[int] = []

    def run(self, requests):
        self.batches.append(len(requests))
        for request in requests:
            number, image = self.images[request.prompt]
            yield image if self.knows(number, request.sampling) else np.full_like(image, 160)


@pytest.fixture
def world(make_tiny_world):
    return make_tiny_world()


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    """Measure the image tokenizer on few images."""
    monkeypatch.setattr(module, "TOKENIZER_IMAGES", 8)


def test_summarize_images_counts_and_names_confusions(make_tiny_world):
    world = make_tiny_world()
    fox, dog = world.things[1:3]
    grader = SceneGrader(world)
    asked = Scene(colour=BLUE, kind="one", things=(fox,))
    pair = Scene(colour=BLUE, kind="beside", things=(fox, dog))
    wrong = Scene(colour=WHITE, kind="one", things=(dog,))
    pairs = ((asked, asked), (asked, wrong), (asked, wrong), (pair, pair))
    grades = [grader.grade(world.render(shown), scene) for scene, shown in pairs]
    summary = summarize_images(grades)
    assert summary["pictures"] == 4
    assert (summary["object"]["right"], summary["object"]["of"], summary["object"]["accuracy"]) == (2, 4, 0.5)
    assert summary["count"] == {"right": 0, "of": 0, "accuracy": None, "low": None, "high": None}
    assert (summary["relation"]["right"], summary["relation"]["of"]) == (1, 1)
    assert summary["everything"]["right"] == 2
    assert {"asked": "狐狸", "seen": "狗", "times": 2} in summary["confusions"]
    assert {"asked": "蓝色", "seen": "白色", "times": 2} in summary["confusions"]


def test_held_out_scenes_differ_and_have_complete_captions(make_tiny_world):
    world = make_tiny_world()
    asked = held_out_scenes(world, 50, seed=2)
    assert asked == held_out_scenes(world, 50, seed=2)
    assert len({scene.meaning for scene, _ in asked}) == 50
    assert all(scene.held_out and "背景" in caption for scene, caption in asked)
    with pytest.raises(InputError, match="a world of 6 objects has too few held-out scenes: 1000 requested"):
        held_out_scenes(world, 1000)


@pytest.mark.parametrize("weights", [SceneWeights(), SceneWeights(pair=0), SceneWeights(one=0, many=0)])
def test_num_held_out_scenes_equals_the_scenes_that_sampling_finds(make_tiny_world, monkeypatch, weights):
    """More scenes than there are were sampled for minutes before they were refused."""
    world = make_tiny_world(weights=weights)
    sampled = {world.sample_scene(0, index, held_out=True).meaning for index in range(3000)}
    assert num_held_out_scenes(world) == len(sampled)
    monkeypatch.setattr(EmojiWorld, "sample_scene", None)  # is not asked
    with pytest.raises(InputError, match=f"has {len(sampled)} held-out scenes, 1000000000000 requested"):
        held_out_scenes(world, 10**12)


def test_evaluate_scenes_grades_a_painter_who_knows_three_of_four(world):
    painter = Painter(world, 24, 5, lambda number, sampling: number % 4)
    report, images = evaluate_scenes(painter, world, count=24, seed=5, sampling=Sampling(), batch_size=10)
    assert painter.batches == [10, 10, 4]
    assert len(images) == 24
    right = report["drawn"]["everything"]
    assert (right["right"], right["of"]) == (18, 24)
    assert right["low"] < 0.75 < right["high"]
    asked = [report["drawn"][part]["of"] for part in ("colour", "object", "everything")]
    assert asked == [24, 24, 24]
    assert report["ceiling_true_scenes"]["everything"]["accuracy"] == 1
    assert report["ceiling_reconstructions"]["everything"]["accuracy"] == 1
    assert report["image_tokenizer"]["psnr"] == 100
    assert report["reconstruction_psnr"] == {"p01": 100.0, "p05": 100.0, "median": 100.0}
    assert report["image_tokenizer"]["images"] == 8


def test_evaluate_scenes_has_a_low_bound_when_the_tokenizer_loses_everything(world):
    painter = Painter(world, 12, 0, lambda number, sampling: True, grey=True)
    report, _ = evaluate_scenes(painter, world, count=12, seed=0, sampling=Sampling(), batch_size=5)
    assert report["drawn"]["everything"]["accuracy"] == 1
    assert report["ceiling_reconstructions"]["everything"]["accuracy"] == 0
    assert report["ceiling_true_scenes"]["everything"]["accuracy"] == 1


def test_evaluate_scenes_describes_its_protocol(world):
    sampling = Sampling(temperature=0.5, top_k=7)
    reports = {}
    for seed in (0, 1):
        painter = Painter(world, 4, seed, lambda number, sampling: True)
        reports[seed], _ = evaluate_scenes(painter, world, count=4, seed=seed, sampling=sampling, batch_size=4)
    made = reports[0]["protocol"]
    assert (made["captions"], made["seed"], made["things"], made["candidates"]) == (4, 0, 6, 6)
    assert made["sampling"] == to_mapping(sampling)
    assert made["model"] == "painter"
    assert made["world"]["canvas"] == 64
    assert made["captions_sha256"] != reports[1]["protocol"]["captions_sha256"]


def test_tune_sampling_orders_settings_by_tuning_captions(world):
    painter = Painter(world, 10, TUNING_SEED, lambda number, sampling: number < 10 * sampling.temperature)
    grid = [Sampling(temperature=temperature, top_k=20) for temperature in (0.3, 0.9, 0.5)]
    results = tune_sampling(painter, world, grid, count=10, batch_size=4)
    assert [sampling.temperature for sampling, _ in results] == [0.9, 0.5, 0.3]
    assert [grades["everything"]["right"] for _, grades in results] == [9, 5, 3]


def test_tune_sampling_prefers_less_noise_among_equals(world):
    painter = Painter(world, 10, TUNING_SEED, lambda number, sampling: number < 10 * sampling.temperature)
    grid = [Sampling(temperature=t, top_k=k) for t, k in ((0.9, 5), (0.8, 20), (0.8, 5), (0.7, 5), (0.3, 5))]
    results = tune_sampling(painter, world, grid, count=10, batch_size=4)
    # The 95% interval of 9 of 10 begins at 0.596: 7 of 10 lies in it, 3 does not.
    assert [(tried.temperature, tried.top_k) for tried, _ in results][:2] == [(0.7, 5), (0.9, 5)]
    assert results[-1][0].temperature == 0.3


def test_check_world_refuses_another_world(make_tiny_world, tiny_model):
    with pytest.raises(InputError, match="generates 64 pixels, the world has 128: use the recipe of the model"):
        check_world(tiny_model, make_tiny_world(canvas=128))
    with pytest.raises(InputError, match="knows 4 objects, not the 6 of this world: use the recipe of the model"):
        check_world(tiny_model, make_tiny_world())
    world = make_tiny_world(things=3)
    named = tuple(NamedThing(name=thing.name) for thing in world.things)
    model = CogView(tiny_model.model, tiny_model.placement, "tiny")
    model.model = SimpleNamespace(config=tiny_model.config, things=named, image_tokenizer=tiny_model.image_tokenizer)
    check_world(model, world)
    model.model.things = (*named[:2], replace(named[2], name="河马"))
    with pytest.raises(InputError, match="knows 3 objects, not the 3 of this world"):
        check_world(model, world)


def test_format_report_is_a_table():
    sure = {"right": 9, "of": 10, "accuracy": 0.9, "low": 0.596, "high": 0.982}
    none = {"right": 0, "of": 0, "accuracy": None, "low": None, "high": None}
    grades = {"colour": sure, "object": sure, "count": none, "relation": sure, "everything": sure}
    report = {
        "drawn": grades,
        "ceiling_reconstructions": grades,
        "ceiling_true_scenes": grades,
        "image_tokenizer": {
            "scales": [1, 2],
            "images": 2048.0,
            "psnr": 26.6277,
            "codes_used": 0.935,
            "perplexity": 1796.2,
        },
    }
    lines = format_report(report).splitlines()
    assert lines[0] == "| right | generated images | VQ-VAE's reconstructions | true scenes |"
    assert lines[2] == "| colour (of 10) |" + 3 * " 90.0% (59.6%–98.2%) |"
    assert lines[4] == "| count (of 0) | – | – | – |"
    assert lines[-1] == (
        "Image tokenizer on 2048 held-out scenes at scale 1 and 2: PSNR 26.63 dB, "
        "93.5% of the codes used, perplexity 1796."
    )
