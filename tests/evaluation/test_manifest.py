"""Result files and manifests: round trips, seals, and the fields in which two results are unlike."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from cogview.errors import InputError
from cogview.evaluation.manifest import (
    BlurRecord,
    Manifest,
    ModelRecord,
    NetworkRecord,
    ResizeRecord,
    ResultCurve,
    ResultItems,
    ResultValue,
    SeedsRecord,
    SelectionRecord,
    SetRecord,
    hash_prompts,
    hash_set,
    manifest_fields,
    read_result,
    unlike_fields,
    write_result,
)
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions, hash_weights
from cogview.pipeline.cogview import CogView

PROMPTS = ["一个红苹果", "蓝色背景上的三只狐狸"]
MANIFEST = Manifest(
    measure="images",
    prompts=hash_prompts(PROMPTS),
    reference=hash_set("true", ["b" * 64, "a" * 64]),
    candidate=SetRecord(name="one", sha256="1" * 64, count=2),
    resize=ResizeRecord(side=64, filter="bicubic", antialias=True),
    network=NetworkRecord(name="stub", sha256="2" * 64, dimensions=2),
    blur=BlurRecord(sigma=1.0, which="both"),
    selection=SelectionRecord(candidates=4, by="log p(text | picture)"),
    seeds=SeedsRecord(first=7, count=2),
    sampling={"temperature": 1.0, "top_k": 100},
    model=ModelRecord(name="tiny", sha256="3" * 64),
    settings={"真": [1, 2.5, None]},
    versions={"cogview": "0"},
    hardware={"threads": 1},
)
RESULTS = {"fid": ResultValue(value=18.0, low=17.0, high=19.5, n=2, higher_is_better=False)}
ITEMS = ResultItems(ids=["0", "1"], values={"psnr": [20.0, None]}, pictures=["0.png", "1.png"])


@pytest.fixture
def result_file(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, MANIFEST, RESULTS, ITEMS, {"best of": ResultCurve(x=[1, 2], y=[0.1, 0.2], x_label="N")})
    return path


def test_write_result_is_read_back(result_file):
    found = read_result(result_file)
    assert (found.manifest, found.results, found.items) == (MANIFEST, RESULTS, ITEMS)
    assert found.curves == {"best of": ResultCurve(x=[1.0, 2.0], y=[0.1, 0.2], x_label="N")}
    assert len(found.sha256) == 64


def test_write_result_takes_plain_mappings_and_numpy(tmp_path):
    value = {"value": np.float32(0.5), "n": np.int64(3), "unit": "dB", "higher_is_better": True}
    write_result(tmp_path / "a.json", Manifest(measure="m"), {"psnr": value}, {"ids": ["x"], "values": {"psnr": [0.5]}})
    found = read_result(tmp_path / "a.json")
    assert found.results == {"psnr": ResultValue(value=0.5, n=3, unit="dB", higher_is_better=True)}
    assert manifest_fields(found.manifest) == {"measure": "m"}  # unused fields are not written


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_write_result_refuses_numbers_that_are_not_finite(tmp_path, number):
    with pytest.raises(InputError, match=r"results\.fid\.value is (nan|inf), expected a finite number"):
        write_result(tmp_path / "a.json", MANIFEST, {"fid": ResultValue(value=number, n=2)})
    assert not list(tmp_path.iterdir())


def test_hash_prompts_is_that_of_lines():
    assert hash_prompts(["一", "二"]).sha256 == "cf0a4df82e84b08a0466dcfcce80329b4b7c541f3c5ae6733980096b19de9396"
    assert hash_prompts(PROMPTS) != hash_prompts(PROMPTS[::-1])


def test_hash_set_ignores_order():
    assert hash_set("a", ["1", "2"]) == hash_set("a", ["2", "1"]) != hash_set("a", ["1", "1"])


@pytest.fixture
def tiny_model_folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


def change(path, **values) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "cogview-result-2"}, "has the format cogview-result-2, this version reads cogview-result-1"),
        ({"format": "something"}, "is not a result: expected a JSON file with the format cogview-result-1"),
        ({"format": 1}, "is not a result"),
        ({"results": {}}, "was changed after it was written: its SHA-256 is"),
        ({"sha256": None}, "was changed after it was written"),
        ({"results": {"fid": {"value": float("nan"), "n": 2}}}, "results.fid.value is nan, expected a finite number"),
    ],
)
def test_read_result_refuses_what_it_cannot_trust(result_file, values, message):
    change(result_file, **values)
    with pytest.raises(InputError) as error:
        read_result(result_file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "7", "{}", "{", '{"format": ["cogview-result-1"]}'])
def test_read_result_refuses_other_files(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"is not a result|is not JSON"):
        read_result(path)


def test_read_result_accepts_another_layout_of_the_file(result_file):
    """The seal is that of the content: white space and the order of keys do not count."""
    content = json.loads(result_file.read_text(encoding="utf-8"))
    result_file.write_text(json.dumps(content, sort_keys=True, indent=7), encoding="utf-8")
    assert read_result(result_file).manifest == MANIFEST


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"model": ModelRecord(name="b", sha256="4" * 64), "versions": {}, "hardware": {}}, []),
        ({"candidate": SetRecord(name="b", sha256="5" * 64, count=2)}, []),
        ({"candidate": SetRecord(name="b", sha256="5" * 64, count=3)}, ["candidate.count"]),
        ({"reference": SetRecord(name="b", sha256="5" * 64, count=2)}, ["reference.sha256"]),
        ({"resize": ResizeRecord(side=64, filter="lanczos", antialias=True)}, ["resize.filter"]),
        ({"blur": None}, ["blur.sigma", "blur.which"]),
        ({"sampling": {"temperature": 0.5, "top_k": 100}, "measure": "model"}, ["measure", "sampling.temperature"]),
        ({"settings": {"真": [1]}}, ["settings.真"]),
    ],
)
def test_unlike_fields_names_what_differs(changes, fields):
    other = replace(MANIFEST, **changes)
    assert unlike_fields(MANIFEST, other) == unlike_fields(other, MANIFEST) == fields


def test_unlike_fields_allows_a_field_with_all_below():
    other = replace(MANIFEST, blur=BlurRecord(sigma=2.0, which="reference"))
    assert unlike_fields(MANIFEST, other) == ["blur.sigma", "blur.which"]
    assert unlike_fields(MANIFEST, other, allow=["blur.sigma"]) == ["blur.which"]
    assert unlike_fields(MANIFEST, other, allow=["blur"]) == []


def test_items_must_match_their_ids():
    with pytest.raises(ValueError, match="psnr has 1 items, there are 2 ids"):
        ResultItems(ids=["0", "1"], values={"psnr": [1.0]})
    with pytest.raises(ValueError, match="an id is given twice"):
        ResultItems(ids=["0", "0"], values={})


def test_describe_model_notices_one_changed_byte(tiny_model_folder):
    model = CogView.from_pretrained(tiny_model_folder, device="cpu")
    record = describe_model(model)
    assert (record.name, record.weights, record.adapters) == (tiny_model_folder.name, "float32", ())
    assert record.sha256 == hash_weights([tiny_model_folder])
    path = tiny_model_folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert hash_weights([tiny_model_folder]) != record.sha256


def test_describe_versions_leaves_out_what_is_not_installed():
    found = describe_versions("no-such-package", "pillow")
    assert set(found) == {"cogview", "python", "torch", "numpy", "pillow"}
    assert set(describe_hardware()) == {"cpu", "threads", "device"}
