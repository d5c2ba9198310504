"""Bundles: each task gives what its weights alone would give."""

import dataclasses
import json
import pickle
import shutil
import weakref

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cogview.checkpoints import registry
from cogview.checkpoints.checkpoint import load_model, load_transformer, save_model
from cogview.checkpoints.registry import converted_folder
from cogview.errors import InputError
from cogview.modeling.config import Sampling
from cogview.modeling.quantization import Int8Linear
from cogview.pipeline import bundle as module
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.text import train_text_tokenizer
from tests.factories import input_error

CPU = torch.device("cpu")
FOX = "蓝色背景上的一只狐狸"
# What each of them was trained for, and in what it differs from the others.
PARTS = {
    "generator": {"tasks": ("generate",), "caption_dropout": 0.0},
    "captioner": {"tasks": ("caption",), "caption_stop": False, "max_caption": 5},
    "upscaler": {"tasks": ("upscale", "low_level"), "sampling": Sampling(temperature=0.5, top_k=7)},
}
BUNDLE = {"generate": "generator", "caption": "captioner", "upscale": "upscaler", "low_level": "upscaler"}


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    """A folder with the checkpoint folder of each part, their weights far from each other."""
    home = tmp_path_factory.mktemp("trained")
    for seed, (name, changes) in enumerate(PARTS.items()):
        model = load_model(tiny_checkpoint, CPU, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.transformer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        config = dataclasses.replace(model.config, **changes)
        save_model(home / name, dataclasses.replace(model, config=config))
    return home


@pytest.fixture
def parts(trained, tmp_path, monkeypatch):
    """Those folders where the known models are looked for, under the names of a registry with a bundle of them."""
    file = {"name": "file", "urls": [], "page": "https://example.org"}
    files = {"transformer": file, "image_tokenizer": file, "text_model": file}
    about = {"about": "", "licence": ""}
    rows = {name: {**about, "tasks": list(PARTS[name]["tasks"]), "files": files} for name in PARTS}
    rows["cogview-bundle"] = {**about, "parts": BUNDLE}
    (tmp_path / "checkpoints.yaml").write_text(yaml.safe_dump(rows, sort_keys=False), encoding="utf-8")
    monkeypatch.setattr(registry, "_package", lambda: tmp_path)
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    return {name: shutil.copytree(trained / name, converted_folder(name)) for name in PARTS}


@pytest.fixture
def loaded(monkeypatch):
    """The names of the parts whose weights are loaded, in turn, and a way to know those that are still there."""

    class Loaded(list):
        def __init__(self):
            super().__init__()
            self.there = weakref.WeakSet()

    loaded = Loaded()

    def load(folder, *settings, **options):
        loaded.append(folder.name)
        transformer = load_transformer(folder, *settings, **options)
        loaded.there.add(transformer)
        return transformer

    monkeypatch.setattr(module, "load_transformer", load)
    return loaded


def open_bundle(**settings):
    return CogView.from_pretrained("cogview-bundle", device="cpu", **settings)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def assert_same(images, expected):
    for image, other in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image.codes, other.codes)
        assert image.sampling == other.sampling
        assert image.tobytes() == other.tobytes()


def texts_of(captions):
    return [[caption.text for caption in own] for own in captions]


# --- who does what ------------------------------------------------------------------------------------------------


def test_bundle_uses_weights_of_each_task(parts):
    bundle, alone = (
        open_bundle(),
        {name: CogView.from_pretrained(folder, device="cpu") for name, folder in parts.items()},
    )
    assert bundle.model.config.tasks == ("generate", "caption", "upscale", "low_level")
    assert bundle.name == "cogview-bundle"
    for task in ("caption", "score"):
        assert bundle.model.config.layouts[task] == alone["captioner"].model.config.layouts[task]

    images = bundle.generate(FOX, n=2, seed=7)
    assert_same(images, alone["generator"].generate(FOX, n=2, seed=7))
    captions = bundle.caption(images, n=2, method="beam")
    assert texts_of(captions) == texts_of(alone["captioner"].caption(images, n=2, method="beam"))
    assert {caption.num_pieces for own in captions for caption in own} == {5}  # without a stop they fill their room
    scores = [score.log_probability for score in bundle.score(images, FOX)]
    expected = [score.log_probability for score in alone["captioner"].score(images, FOX)]
    assert scores == pytest.approx(expected, abs=1e-3)
    for low_level in (False, True):
        settings = {"seed": 7, "low_level": low_level}
        assert_same(bundle.upscale(images, FOX, **settings), alone["upscaler"].upscale(images, FOX, **settings))

    # Others would have done it otherwise.
    other = CogView(alone["generator"].model, alone["generator"].placement, "other")
    other.model.config = dataclasses.replace(other.model.config, tasks=("caption",))
    assert other.score(images, FOX)[0].log_probability != pytest.approx(scores[0], abs=0.1)


def test_generate_keep_uses_two_sets_of_weights(parts):
    """Images are generated by one and scored by the other."""
    bundle, alone = open_bundle(), CogView.from_pretrained(parts["captioner"], device="cpu")
    images = CogView.from_pretrained(parts["generator"], device="cpu").generate(FOX, n=3, seed=7)
    best = bundle.generate(FOX, n=3, keep=1, seed=7)
    assert_same(best, alone.rerank(images)[:1])


def test_sampling_uses_settings_of_task(parts):
    """Defaults and guidance are those of the weights that do the task."""
    bundle = open_bundle()
    assert bundle.sampling().temperature == 0.9
    assert bundle.sampling(task="upscale") == bundle.sampling(task="low_level") == PARTS["upscaler"]["sampling"]
    assert bundle.sampling(top_k=3, task="upscale") == Sampling(temperature=0.5, top_k=3)
    with pytest.raises(InputError, match=r"^cogview-bundle was trained without caption dropout, so it cannot be g"):
        bundle.sampling(guidance=2)
    assert bundle.sampling(guidance=2, task="upscale").guidance == 2


def test_transformer_is_that_of_first_task(parts):
    weights = open_bundle().transformer.state_dict()
    expected = load_transformer(parts["generator"], CPU, torch.float32).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_bundle_quantizes_every_part(parts, loaded):
    bundle = open_bundle(dtype="int8")
    assert str(bundle.placement) == "cpu, bfloat16 with weights in int8 (as requested)"
    image = bundle.generate(FOX, seed=7)[0]
    bundle.score([image], FOX)
    assert loaded == ["generator", "captioner"]
    for transformer in loaded.there:
        assert isinstance(transformer.layers[0].mlp.input, Int8Linear)
    assert_same([image], CogView.from_pretrained(parts["generator"], device="cpu", dtype="int8").generate(FOX, seed=7))


# --- when they are loaded -----------------------------------------------------------------------------------------


def one_of_each(bundle):
    """What a round of all tasks gives, to compare."""
    image = bundle.generate(FOX, seed=7)[0]
    return [
        image.tobytes(),
        texts_of(bundle.caption([image], method="beam", n=3)),
        bundle.upscale([image], FOX, seed=7, low_level=True)[0].tobytes(),
    ]


def test_bundle_loads_part_when_first_needed(parts, loaded, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda device: 10**12)
    bundle = open_bundle()
    assert all(parameter.is_meta for parameter in bundle.model.transformer.parameters())
    with pytest.raises(InputError, match=r"^the prompt is empty"):
        bundle.generate("")
    assert loaded == []
    image = bundle.generate(FOX, seed=7)[0]
    assert loaded == ["generator"]
    bundle.score([image], FOX)
    assert loaded == ["generator", "captioner"]
    bundle.upscale([image], FOX, low_level=True)
    assert loaded == ["generator", "captioner", "upscaler"]
    one_of_each(bundle)
    assert loaded == ["generator", "captioner", "upscaler"]
    assert len(loaded.there) == 3


def test_bundle_evicts_least_recently_used_part(parts, loaded, monkeypatch):
    """On a machine that has room for two."""
    expected = one_of_each(open_bundle())
    loaded.clear()
    size = load_transformer(parts["generator"], CPU, torch.float32).config.num_parameters * 4
    monkeypatch.setattr(module, "available_memory", lambda device: (2 - len(loaded.there)) * 1.2 * size)
    bundle = open_bundle()
    image = bundle.generate(FOX, seed=7)[0]
    bundle.caption([image])
    bundle.generate(FOX, seed=7)
    assert loaded == ["generator", "captioner"]
    bundle.upscale([image], FOX, seed=7, low_level=True)
    assert loaded == ["generator", "captioner", "upscaler"]
    assert len(loaded.there) == 2
    assert_same(bundle.generate(FOX, seed=7), [image])
    assert loaded == ["generator", "captioner", "upscaler"]
    bundle.caption([image])
    assert loaded == ["generator", "captioner", "upscaler", "captioner"]
    assert one_of_each(bundle) == expected
    assert len(loaded.there) == 2


def test_bundle_holds_one_part_when_memory_is_low(parts, loaded, monkeypatch):
    expected = one_of_each(open_bundle())
    loaded.clear()
    monkeypatch.setattr(module, "available_memory", lambda device: 0)
    bundle = open_bundle()
    assert one_of_each(bundle) == expected
    assert one_of_each(bundle) == expected
    assert loaded == 2 * ["generator", "captioner", "upscaler"]
    assert len(loaded.there) == 1


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_bundle_plans_memory_by_converted_dtype(parts, loaded, monkeypatch, dtype, share):
    size = share * load_transformer(parts["generator"], CPU, torch.float32).config.num_parameters * 4
    bundle = open_bundle(dtype=dtype)
    for free, there in ((1.1, 1), (1.2, 2)):
        monkeypatch.setattr(module, "available_memory", lambda device, free=free: free * size)
        bundle.transformer  # noqa: B018  that of the first task
        bundle.score(bundle.generate(FOX, seed=7), FOX)
        assert len(loaded.there) == there


# --- parts that are not there, or do not fit ----------------------------------------------------------------------


def error_of(**settings):
    """The one line that opening the bundle ends in."""
    return input_error(open_bundle, **settings)


def test_bundle_works_when_parts_are_missing(parts):
    shutil.rmtree(parts["captioner"])
    bundle = open_bundle()
    assert bundle.model.config.tasks == ("generate", "upscale", "low_level")
    image = bundle.generate(FOX, seed=7)[0]
    assert bundle.upscale([image], FOX, low_level=True)[0].size == (64, 64)
    for refused in (
        lambda: bundle.caption([image]),
        lambda: bundle.score([image], FOX),
        lambda: bundle.generate(FOX, n=2, keep=1),
    ):
        with pytest.raises(InputError) as caught:
            refused()
        assert str(caught.value) == (
            "the task 'caption' of cogview-bundle needs captioner, which is not on this machine: "
            "cogview download captioner"
        )


def test_bundle_refuses_task_of_missing_part(parts):
    shutil.rmtree(parts["generator"])
    shutil.rmtree(parts["upscaler"])
    bundle = open_bundle()
    assert bundle.model.config.tasks == ("caption",)
    with pytest.raises(InputError, match=r"^the task 'generate' of cogview-bundle needs generator, which is not on"):
        bundle.generate(FOX)
    assert len(bundle.caption([Image.new("RGB", (64, 64), "red")])) == 1


@pytest.mark.parametrize(("name", "value"), [("codebook_sha256", "0" * 64), ("max_text", 19), ("text_positions", 20)])
def test_bundle_refuses_parts_with_other_config(parts, name, value):
    change_config(parts["upscaler"], **{name: value})
    assert error_of() == f"{parts['upscaler']} and {parts['generator']} make no bundle: they differ in {name}"


def test_bundle_refuses_parts_with_other_text_model(parts):
    (parts["captioner"] / "text.model").write_bytes(train_text_tokenizer([FOX, "一个红苹果"] * 4, size=290))
    assert error_of() == f"{parts['captioner']} and {parts['generator']} make no bundle: they differ in text.model"


def test_bundle_refuses_part_without_its_task(parts):
    change_config(parts["upscaler"], tasks=["upscale", "caption"])
    assert error_of() == f"{parts['upscaler']} was not trained for the task 'low_level': upscale, caption"


@pytest.mark.parametrize("name", ["generator", "upscaler"])
def test_bundle_refuses_incomplete_part(parts, name):
    (parts[name] / "model.safetensors").unlink()
    assert error_of() == f"the checkpoint {parts[name]} is incomplete: model.safetensors is missing"


def test_damaged_part_leaves_others_usable(parts):
    path = parts["upscaler"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    bundle = open_bundle()
    image = bundle.generate(FOX, seed=7)[0]
    with pytest.raises(InputError) as caught:
        bundle.upscale([image], FOX)
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert_same(bundle.generate(FOX, seed=7), [image])


def test_bundle_copy_loads_weights_when_needed(parts):
    """The weights of the parts stay in their folders."""
    bundle = open_bundle()
    images = bundle.generate(FOX, seed=7)
    pickled = pickle.dumps(bundle)
    assert not pickle.loads(pickled).bundle._loaded
    assert_same(pickle.loads(pickled).generate(FOX, seed=7), images)
