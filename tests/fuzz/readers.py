"""The readers of files from outside: valid files of each kind, and the function that reads them.

A reader accepts a damaged file, or raises ``InputError`` with one line. Anything else is a bug.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests import factories, v1_release
from tests.fuzz.reader import Reader
from tests.training import factories as training

CAPTIONS = tuple(
    f"{colour}色背景上的{number}只{thing}" for colour in "红蓝" for number in "一两" for thing in ("狐狸", "狗")
)
SIZES = {"num_image_codes": 8192, "num_text_pieces": 50000, "codebook_sha256": "c0de" * 16, "text_sha256": "7e47" * 16}


def run_command(*arguments: str | Path) -> None:
    """Run a command in this process; raise its line as InputError if it refuses the input.

    Raises:
        AssertionError: A status or a message is not as documented.
    """
    from cogview.cli.main import main
    from cogview.errors import ExitStatus, InputError

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, arguments)])
    assert status in set(ExitStatus), f"exit status {status}"
    said = err.getvalue()
    assert "Traceback" not in said, said
    if status in (ExitStatus.MISTAKE, ExitStatus.RETRY_LATER):
        assert said.strip(), f"exit status {status} without a word"
        line = said.strip().splitlines()[-1]
        assert "Errno" not in line, line
        assert len(line) < 2500, line[:3000]
        raise InputError(line)


# Images


def make_images(folder: Path) -> None:
    """Write images of all formats and many modes."""
    from PIL import Image, ImageCms, PngImagePlugin

    x, y = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 30))
    colours = Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    texts = PngImagePlugin.PngInfo()
    metadata = {"prompt": "一只狐狸", "seed": "7", "index": "0", "model": "tiny", "codes": "1 2 3", "cogview": "0.3"}
    for key, value in {**metadata, "temperature": "0.3", "task": "generate"}.items():
        texts.add_itxt(key, value, zip=key == "codes")
    parameters = "a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 40x30"
    a1111 = PngImagePlugin.PngInfo()
    a1111.add_text("parameters", parameters)
    variants: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "metadata": (colours, "png", {"pnginfo": texts}),
        "a1111": (colours, "png", {"pnginfo": a1111}),
        "profile": (colours, "png", {"icc_profile": profile, "exif": exif}),
        "palette": (colours.quantize(16), "png", {"transparency": 3}),
        "bits": (colours.convert("1"), "png", {}),
        "alpha": (colours.convert("RGBA"), "png", {}),
        "grey-alpha": (colours.convert("LA"), "png", {}),
        "grey-16": (Image.fromarray((x * 200).astype(np.uint16)), "png", {}),
        "jpeg": (colours, "jpg", {"exif": exif, "icc_profile": profile}),
        "progressive": (colours, "jpg", {"progressive": True}),
        "cmyk": (colours.convert("CMYK"), "jpg", {}),
        "webp": (colours, "webp", {"exif": exif}),
        "lossless": (colours.convert("RGBA"), "webp", {"lossless": True}),
        "animated": (colours, "webp", {"save_all": True, "append_images": [colours.rotate(90)]}),
        "gif": (colours, "gif", {"save_all": True, "append_images": [colours.rotate(90)]}),
        "bmp": (colours, "bmp", {}),
        "bmp-palette": (colours.quantize(16), "bmp", {}),
        "tiff": (colours, "tif", {}),
        "lzw": (colours.convert("LAB"), "tif", {"compression": "tiff_lzw"}),
        "deflate": (Image.fromarray(x.astype(np.float32)), "tif", {"compression": "tiff_deflate"}),
        "tiff-jpeg": (colours, "tif", {"compression": "jpeg"}),
        "ppm": (colours, "ppm", {}),
    }
    for name, (image, suffix, options) in variants.items():
        (folder / name).mkdir(parents=True)
        image.save(folder / name / f"image.{suffix}", **options)


def read_images(folder: Path) -> None:
    """Read the image, its metadata, and its description."""
    from cogview.cli.picture_info import describe_png, is_png
    from cogview.errors import InputError
    from cogview.image_io.png import read_metadata
    from cogview.image_io.reading import fit, read_image

    path = next(folder.glob("image.*"), folder / "image.png")
    read_metadata(path)
    if is_png(path):
        with contextlib.suppress(InputError):
            assert "\n" not in "".join(describe_png(path).values())
    pixels, _ = fit(read_image(path), 64)
    assert pixels.shape == (64, 64, 3)


# Token stores and datasets


def make_stores(folder: Path) -> None:
    """Write a token store with its checksum, and one of an earlier version without."""
    for name in ("new", "old"):
        training.write_store(folder / name / "store", 60).close()
    (folder / "old" / "store" / "data.sha256").unlink()


def read_store(folder: Path) -> None:
    """Read every row of the store."""
    from cogview.data.store import TokenStore
    from cogview.files import file_sha256

    path = folder / "store"
    with TokenStore(path) as store:
        rows = store.read(range(min(len(store), 1000)))
        assert all((rows[name] < 65536).all() for name in rows)
    if (checksum := path / "data.sha256").is_file():
        assert file_sha256(path / "data.mdb") in checksum.read_text("utf-8", "replace"), "damage was not noticed"


def make_store_entries(folder: Path) -> None:
    """Write the header and count of a token store as files."""
    training.write_store(folder / "store", 3).close()
    from cogview.data.store import TokenStore

    with TokenStore(folder / "store") as store:
        header = store.header
    shutil.rmtree(folder / "store")
    (folder / "only").mkdir()
    (folder / "only" / "header.json").write_text(header.to_json(), "utf-8")
    (folder / "only" / "count.txt").write_text("3")


def read_store_entries(folder: Path) -> None:
    """Build a store of header and count, and read it."""
    values = {name: _content(folder / f"{name}.{suffix}") for name, suffix in (("header", "json"), ("count", "txt"))}
    rows = {number.to_bytes(8, "big"): bytes(168) for number in range(3)}
    _write_lmdb(folder / "store", {name.encode(): value for name, value in values.items()}, rows)
    read_store(folder)


def make_v1_rows(folder: Path) -> None:
    """Write rows of a CogView v1 dataset as pickles of several protocols and as JSON."""
    codes = list(range(64))
    arrays = {"arrays": (np.array([8200]), np.array(codes)), "numbers": ([np.int64(8200)], list(np.array(codes)))}
    for name, row in {"pair": ([8200, 8300], codes), "lists": [[8200], [[0] * 8] * 8], **arrays}.items():
        (folder / name).mkdir(parents=True)
        for protocol in (2, 4, 5):
            (folder / name / f"{protocol}.pickle").write_bytes(pickle.dumps(row, protocol))
    (folder / "plain").mkdir()
    (folder / "plain" / "0.json").write_text(json.dumps([[8200, 8300], codes]))


def read_v1_rows(folder: Path) -> None:
    """Build a dataset of the rows, and read each."""
    from cogview.data.v1_datasets import V1Dataset
    from cogview.errors import InputError

    values = []
    for path in sorted(folder.iterdir()):
        content = _content(path)
        if path.suffix == ".json":
            try:
                content = pickle.dumps(json.loads(content), 4)
            except (ValueError, RecursionError):
                content = b""
        values.append(content)
    rows = {b"%d" % number: value for number, value in enumerate(values)}
    _write_lmdb(folder / "data", {**rows, b"length": b"%d" % len(rows)})
    dataset = V1Dataset(folder / "data", **SIZES)
    try:
        for number in range(len(rows)):
            with contextlib.suppress(InputError):
                dataset.read([number])
    finally:
        dataset.close()


def make_v1_datasets(folder: Path) -> None:
    """Write a CogView v1 dataset as LMDB and as a .bin file."""
    codes = np.arange(64)
    rows = {b"%d" % number: pickle.dumps(([8200, 8300], codes + number), 4) for number in range(100)}
    (folder / "lmdb").mkdir(parents=True)
    _write_lmdb(folder / "lmdb" / "data", {**rows, b"length": b"100"})
    (folder / "bin").mkdir()
    ids = np.full((4, 64 + 64), -1, dtype="<i4")
    ids[:, :3], ids[:, 64:] = 8200, codes
    ids.tofile(folder / "bin" / "data.bin")


def read_v1_datasets(folder: Path) -> None:
    """Read every row, and import the dataset into a store."""
    from cogview.data.v1_datasets import V1Dataset
    from cogview.data.v1_import import import_dataset

    path = folder / "data.bin" if (folder / "data.bin").exists() else folder / "data"
    with V1Dataset(path, **SIZES, grid=8) as dataset:
        dataset.read(range(min(len(dataset), 1000)))
        import_dataset(folder / "store", [dataset], skip_bad=True)


def make_sources(folder: Path) -> None:
    """Write captioned pictures as a folder, tables, captions of COCO and a tar shard."""
    from PIL import Image

    for name in ("folder", "csv", "tsv", "jsonl", "json", "tar"):
        (folder / name / "source").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16), (9 * number, 200, 30)).save(folder / name / "source" / f"{number}.png")
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS[:2])]
    for row in rows:
        for name in ("folder", "tar"):
            text = folder / name / "source" / row["image"]
            text.with_suffix(".txt").write_text(row["caption"], "utf-8")
    for suffix, mark in (("csv", ","), ("tsv", "\t")):
        lines = [mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]
        (folder / suffix / "source" / f"source.{suffix}").write_text("\n".join(lines), "utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "jsonl" / "source" / "source.jsonl").write_text("\n".join(lines), "utf-8")
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
    captions = [{"id": number, "image_id": number, "caption": CAPTIONS[number]} for number in range(2)]
    coco = json.dumps({"images": images, "annotations": captions})
    (folder / "json" / "source" / "source.json").write_text(coco)
    with tarfile.open(folder / "tar" / "source.tar", "w") as archive:
        archive.add(folder / "tar" / "source", ".")
    shutil.rmtree(folder / "tar" / "source")


def read_source(folder: Path) -> None:
    """Open the source, and read every picture and its captions."""
    from cogview.data.sources.open import open_source
    from cogview.data.sources.tables import TableOptions
    from cogview.errors import InputError
    from cogview.image_io.reading import read_image

    path = next(folder.glob("source/source.*"), next(folder.glob("source*"), folder))
    for record in open_source(path, TableOptions(), lambda note: None):
        with contextlib.suppress(InputError):
            if record.file is not None:
                read_image(record.file.path, content=record.file.read_part())


# Weights


def make_v1_weights(folder: Path) -> None:
    """Write transformers and image tokenizers of CogView v1: zip archives, the older layout, and a tar archive."""
    release = v1_release.small_release()
    for name, options in {"zip": {}, "legacy": {"legacy": True}, "shards": {"shards": 2}}.items():
        (folder / name).mkdir(parents=True)
        release.write(folder / name, **options)
        (folder / name / "text.model").unlink()
    (folder / "tar").mkdir()
    with tarfile.open(folder / "tar" / "transformer.tar", "w") as archive:
        archive.add(folder / "zip" / "transformer", "cogview-base")


def read_v1_weights(folder: Path) -> None:
    """Read every tensor of the image tokenizer and of the transformer."""
    from cogview.checkpoints.v1_format import V1Transformer
    from cogview.checkpoints.v1_vqvae import read_v1_vqvae

    if (folder / "vqvae.pt").exists():
        read_v1_vqvae(folder / "vqvae.pt")
    source = folder / "transformer.tar"
    with V1Transformer(source if source.exists() else folder / "transformer") as transformer:
        for name, spec in transformer.specs.items():
            assert tuple(transformer.read(name).shape) == spec.shape


def make_conversions(folder: Path) -> None:
    """Write a whole release of CogView v1."""
    (folder / "only").mkdir(parents=True)
    v1_release.small_release().write(folder / "only")


def read_conversion(folder: Path) -> None:
    """Convert the release into a checkpoint folder."""
    rest = ("--image-tokenizer", folder / "vqvae.pt", "--text-model", folder / "text.model", "--tasks", "generate")
    run_command("convert", folder / "transformer", *rest, "-o", folder / "converted")


def make_text_models(folder: Path) -> None:
    """Write text tokenizers of this toolkit and of CogView v1."""
    models = {
        "own": factories.tiny_text_tokenizer(CAPTIONS, 320).model_bytes,
        "v1": v1_release.small_release().text_model,
    }
    for name, content in models.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "text.model").write_bytes(content)


def read_text_model(folder: Path) -> None:
    """Load the text tokenizer, encode and decode."""
    from cogview.tokenizers.text import TextTokenizer

    tokenizer = TextTokenizer.load(folder / "text.model")
    for text in ("一只狐狸 on a\u2581hill", "", "\U0001f98a" * 50):
        ids = tokenizer.encode(text)
        assert all(0 <= number < tokenizer.size for number in ids)
        tokenizer.decode(ids)
    assert len(tokenizer.pieces) == tokenizer.size


def make_weights(folder: Path) -> None:
    """Write a safetensors file of several dtypes."""
    import torch
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.ones(3, 4), "b.bias": torch.ones(7, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    (folder / "only").mkdir(parents=True)
    save_file({**tensors, "d.scale_zero": torch.arange(5)}, folder / "only" / "model.safetensors", {"format": "pt"})


def read_weights(folder: Path) -> None:
    """Read every tensor of a safetensors file, in both ways."""
    from cogview.checkpoints.safetensors_io import WeightsFile
    from cogview.training.trainer_state import StoredTensors

    file = WeightsFile(folder / "model.safetensors")
    for name, spec in file.specs.items():
        for keep in (False, True):
            tensor = file.read(name, keep=keep)
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
    stored = StoredTensors(folder / "model.safetensors", "a.")
    assert stored.shapes().keys() == dict(stored).keys()


# Checkpoint folders and adapters


def _tiny_model() -> Any:
    from cogview.checkpoints.checkpoint import NamedThing
    from cogview.modeling.config import ReconstructionQuality

    return factories.tiny_model(
        factories.tiny_text_tokenizer(CAPTIONS, 320, max_piece_length=1),
        max_text=20,
        caption_dropout=0.1,
        things=(NamedThing(name="狐狸", emoji="🦊"), NamedThing(name="狗", synonyms=("小狗",))),
        reconstruction_psnr=ReconstructionQuality(p01=15.0, p05=17.0, median=20.0),
        card="# tiny\n",
    )


def make_checkpoints(folder: Path) -> None:
    """Write a checkpoint folder with a grammar."""
    from cogview.checkpoints.checkpoint import save_model
    from cogview.checkpoints.registry import embedded_folder, load_registry

    save_model(folder / "only", _tiny_model())
    embedded = embedded_folder(load_registry()["cogview-emoji"])
    plain = json.loads((embedded / "grammar.json").read_text("utf-8"))
    cut = {
        key: dict(list(v.items())[:9]) if isinstance(v, dict) else v[:9] if isinstance(v, list) else v
        for key, v in plain.items()
    }
    (folder / "only" / "grammar.json").write_text(json.dumps(cut, ensure_ascii=False), "utf-8")


def read_checkpoint(folder: Path) -> None:
    """Describe the checkpoint; then open it, check prompts, and generate an image."""
    from cogview.errors import InputError
    from cogview.pipeline.cogview import CogView

    for option in ((), ("--things",), ("--hashes",)):
        with contextlib.suppress(InputError):
            run_command("info", folder, *option)
    model = CogView.from_pretrained(folder, device="cpu")
    for prompt in ("一只狐狸", "六只蓝色的狐狸和没有猫", "蓝色背景上的两只狗"):
        model.prompt_warning(prompt)
    model.generate(["一只狐狸"], seed=1)


def make_adapters(folder: Path) -> None:
    """Write a LoRA adapter."""
    import torch

    from cogview.checkpoints.adapter import BaseModelInfo, save_adapter
    from cogview.modeling.lora import LoraSettings, add_lora

    model, settings = training.new_model(), LoraSettings(rank=2, alpha=4.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model.transformer, settings)
    save_adapter(folder / "only", model.transformer, settings, BaseModelInfo.of("tiny", model.config))


def read_adapter(folder: Path) -> None:
    """Open the adapter, check it against a model, and load it."""
    from cogview.checkpoints.adapter import Adapter, load_adapter

    model = training.new_model()
    adapter = Adapter(folder)
    adapter.check_model(model.config, "tiny")
    adapter.sha256()
    load_adapter(model.transformer, folder)


# Jobs

RECORDS = (
    {"id": "a", "prompt": "一只狐狸", "seed": 7, "n": 2, "temperature": 0.5},
    {"prompt": "红色背景上的两只狗, 一只狐狸", "top_k": 5, "top_p": 0.9, "guidance": 1.5},
    {"task": "caption", "image": "a.png"},
    {"task": "complete", "prompt": "一只狗", "image": "a.png", "rows": 4},
)


def make_jobs(folder: Path) -> None:
    """Write job files of all formats."""
    columns = ("id", "prompt", "task", "image", "rows", "n", "seed", "temperature", "top_k", "guidance")
    prompts = "".join(f"{record.get('prompt', '一只猫')}\n" for record in RECORDS)
    contents = {"txt": prompts, "jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)}
    for suffix, mark in (("csv", ","), ("tsv", "\t")):
        rows = [columns, *([f'"{record.get(key, "")}"' for key in columns] for record in RECORDS)]
        contents[suffix] = "".join(mark.join(row) + "\n" for row in rows)
    for suffix, content in contents.items():
        (folder / suffix).mkdir(parents=True)
        (folder / suffix / f"job.{suffix}").write_text(content, "utf-8")


def read_job_file(folder: Path) -> None:
    """Read the job, and compute its digest."""
    from cogview.jobs.records import digest, read_job

    source = str(next(folder.glob("job.*"), folder / "job.txt"))
    with contextlib.redirect_stderr(io.StringIO()):
        records, problems = read_job(source)
    assert all("\n" not in problem and len(problem) < 2000 for problem in problems)
    digest(records, source)


def make_journals(folder: Path) -> None:
    """Write a job that is half done: its file, journal and images."""
    from cogview.checkpoints.checkpoint import save_model

    (folder / "only").mkdir(parents=True)
    save_model(folder.parent / "job-model", _tiny_model())
    lines = [{"prompt": "一只狐狸", "n": 2}, {"prompt": "一只狗", "id": "dog"}]
    (folder / "only" / "job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "only" / "out"
    run_command(
        "generate",
        "--input",
        folder / "only" / "job.jsonl",
        "--model",
        folder.parent / "job-model",
        "-o",
        out,
        "--seed",
        "3",
    )
    for path in out.glob("*.lock"):
        path.unlink()
    journal = out / "job.ledger.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3]))
    (folder / "only" / "model").symlink_to(folder.parent / "job-model")


def read_journal(folder: Path) -> None:
    """Resume the job."""
    arguments = ("--input", folder / "job.jsonl", "--model", (folder / "model").resolve(), "-o", folder / "out")
    try:
        run_command("generate", *arguments, "--resume")
    finally:
        outside = {path.name for path in folder.iterdir()} - {"job.jsonl", "out", "model"}
        assert not outside, f"written outside the output folder: {outside}"


# Recipes and runs


def make_recipes(folder: Path) -> None:
    """Copy the packaged recipes."""
    from cogview.training.recipe import packaged_recipes

    for name, path in packaged_recipes().items():
        (folder / name).mkdir(parents=True)
        shutil.copyfile(path, folder / name / "recipe.yaml")


def read_recipe_file(folder: Path) -> None:
    """Read the sections of the recipe as their settings."""
    from cogview.cli.package import PackageSettings
    from cogview.emoji.datasets import SceneEncodeSettings
    from cogview.emoji.settings import WorldSettings
    from cogview.training.recipe import Recipe
    from cogview.training.settings import TransformerSettings
    from cogview.training.text_tokenizer import TextTokenizerRecipe
    from cogview.training.vqvae_recipe import VQVAERecipe

    kinds: Mapping[str, type] = {
        "scenes": WorldSettings,
        "text": TextTokenizerRecipe,
        "image": VQVAERecipe,
        "encode": SceneEncodeSettings,
        "transformer": TransformerSettings,
        "package": PackageSettings,
    }
    recipe = Recipe.open(folder / "recipe.yaml", overrides=("training.steps=100",))
    for name, kind in kinds.items():
        if name in recipe.sections:
            Recipe(
                recipe.path, recipe.sections, recipe.overrides if name in ("image", "transformer") else (), recipe.work
            ).settings(kind, name)


def make_results(folder: Path) -> None:
    """Write a result with everything that one can hold."""
    from cogview.evaluation.manifest import Manifest, ResultCurve, ResultValue, SeedsRecord, hash_prompts, write_result

    (folder / "only").mkdir(parents=True)
    manifest = Manifest(
        measure="scenes",
        prompts=hash_prompts(CAPTIONS),
        seeds=SeedsRecord(first=0, count=8),
        settings={"world": {"things": 4}},
    )
    values = {"right": ResultValue(value=0.5, low=0.2, high=0.8, n=8, unit="fraction", higher_is_better=True)}
    items = {"ids": list(CAPTIONS), "labels": list(CAPTIONS), "values": {"right": [1.0, 0.0] * 4}}
    curves = {"right": ResultCurve(x=[1, 2, 4], y=[0.2, 0.3, 0.5])}
    write_result(folder / "only" / "result.json", manifest, values, items, curves)


def read_results(folder: Path) -> None:
    """Read a result, with its seal and with a new one; then compare it with itself on a page."""
    from cogview.errors import InputError
    from cogview.evaluation.comparison import compare_results
    from cogview.evaluation.manifest import _seal, read_result
    from cogview.evaluation.page import ComparedFiles, comparison_page
    from cogview.plain_data import read_json

    path = folder / "result.json"
    with contextlib.suppress(InputError):
        read_result(path)
    content = read_json(path)
    if isinstance(content, dict):
        content.pop("sha256", None)
        with contextlib.suppress(ValueError):  # NaN, which the reader refuses by itself
            content["sha256"] = _seal(content)
        path.write_text(json.dumps(content), encoding="utf-8")
    result = read_result(path)
    comparison = compare_results(result, result, ("a", "b"))
    comparison_page(comparison, ComparedFiles(names=("a", "b"), folders=(folder, folder)))


def make_runs(folder: Path) -> None:
    """Write run folders with everything that is read again."""
    from cogview.data.phases import Phase, append_phase
    from cogview.training.environment import ENVIRONMENT_FILE

    for name in ("one", "other"):
        run = training.write_run(
            folder / "only" / name / "transformer-run", learning_rate=1e-3 if name == "one" else 2e-3
        )
        append_phase(run / "stores.jsonl", Phase(first_sample=0, names=("a",), weights=(1.0,), sizes=(60,)))
        append_phase(run / "stores.jsonl", Phase(first_sample=9, names=("a", "b"), weights=(1.0, 0.5), sizes=(60, 3)))
        (run / ENVIRONMENT_FILE).write_text(
            '{"time": "2026-11-29", "torch": "2.13", "gpus": [], "command": ["train"]}\n'
        )
        (run / "run.lock").write_text('{"pid": 1, "host": "a", "started": "2026-11-29"}\n')


def read_runs(folder: Path) -> None:
    """List and compare the runs; then resume one."""
    from cogview.data.phases import read_phases
    from cogview.errors import InputError
    from cogview.training.run_folder import RunFolder
    from cogview.training.run_record import read_run

    for option in ((), ("--compare",), ("--json",)):
        with contextlib.suppress(InputError):
            run_command("runs", folder, *option)
    inner = folder / "one" / "transformer-run"
    if inner.is_dir():
        read_phases(inner / "stores.jsonl")
        read_run(inner)
        run = RunFolder(inner)
        with contextlib.redirect_stderr(io.StringIO()):
            run.start({"training": {"steps": 100}}, resume=True)
        run.record_best(150, {"validation_loss": 3.0})


def make_trainer_states(folder: Path) -> None:
    """Write a checkpoint of a training with the optimizer's state."""
    trainer = training.make_trainer()
    training.train_step(trainer, 0, training.store_rows(0))
    (folder / "only").mkdir(parents=True)
    trainer.snapshot()(folder / "only")


def read_trainer_state(folder: Path) -> None:
    """Restore a trainer."""
    training.make_trainer().load(folder)


def make_worlds(folder: Path) -> None:
    """Write an emoji world of two objects."""
    from cogview.emoji.settings import WorldSettings
    from cogview.emoji.things import EmojiObject
    from cogview.emoji.world import EmojiWorld

    things = (EmojiObject(emoji="🍎", name="红苹果"), EmojiObject(emoji="🦊", name="狐狸", measures=("只", "个")))
    sprites = np.zeros((2, 128, 128, 4), dtype=np.uint8)
    sprites[:, 20:100, 20:100] = (200, 20, 60, 255)
    EmojiWorld(WorldSettings(things=2), things, sprites).save(folder / "only")


def read_world(folder: Path) -> None:
    """Load the world, and draw a scene."""
    from cogview.emoji.world import EmojiWorld

    world = EmojiWorld.load(folder)
    assert world.sprites.shape[1:] == (128, 128, 4)


# What a reader must not do


READERS: dict[str, Reader] = {
    "results": Reader(make_results, read_results),
    "images": Reader(make_images, read_images),
    "token stores": Reader(make_stores, read_store),
    "store headers": Reader(make_store_entries, read_store_entries),
    "v1 rows": Reader(make_v1_rows, read_v1_rows),
    "v1 datasets": Reader(make_v1_datasets, read_v1_datasets),
    "picture sources": Reader(make_sources, read_source),
    "v1 weights": Reader(make_v1_weights, read_v1_weights),
    "conversions": Reader(make_conversions, read_conversion),
    "text models": Reader(make_text_models, read_text_model, allowed=(FileNotFoundError, ValueError)),
    "weights": Reader(make_weights, read_weights),
    "checkpoints": Reader(make_checkpoints, read_checkpoint, minimum=12),
    "adapters": Reader(make_adapters, read_adapter),
    "job files": Reader(make_jobs, read_job_file),
    "journals": Reader(make_journals, read_journal, minimum=12),
    "recipes": Reader(make_recipes, read_recipe_file),
    "runs": Reader(make_runs, read_runs, minimum=12),
    "trainer states": Reader(make_trainer_states, read_trainer_state),
    "worlds": Reader(make_worlds, read_world),
}


def _content(path: Path) -> bytes:
    """Return the content of a regular file; nothing of anything else."""
    return path.read_bytes()[: 1 << 20] if path.is_file() and path.stat().st_size < 1 << 26 else b""


def _write_lmdb(path: Path, values: Mapping[bytes, bytes], rows: Mapping[bytes, bytes] | None = None) -> None:
    """Write an LMDB of values, with a table ``rows`` if there are any."""
    import lmdb

    with lmdb.open(str(path), map_size=2**26, max_dbs=1) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key, value)
        if rows is not None:
            table = environment.open_db(b"rows")
            with environment.begin(write=True) as transaction:
                for key, value in rows.items():
                    transaction.put(key, value, db=table)
    (path / "lock.mdb").unlink()
