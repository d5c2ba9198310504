"""Recipes become settings: messages name the position of each mistake, and written settings read back equal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest

from cogview.config_io import RENAMED_KEYS, from_mapping, read_recipe, section, to_mapping
from cogview.errors import InputError
from cogview.modeling.config import Sampling


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Settings:
    num_layers: int
    width: int = 64
    name: str = "小模型"
    dropout: float = 0.1
    fused: bool = True
    checkpoint: int | str = "latest"
    limit: int | None = None
    shape: float | tuple[int, ...] = 1.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    folder: Path = Path("runs")
    colours: tuple[str, ...] = ("红", "蓝")
    mix: dict[str, float] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    optimizer: Optimizer = field(default_factory=Optimizer)
    warm_up: Optimizer | None = None
    stages: tuple[Optimizer, ...] = ()
    notes: Any = None

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ValueError(f"width {self.width} is no multiple of 8")


WHERE = "model section of tiny.yaml"

RECIPE = """
work: runs/tiny
model:
  num_layers: 2
  dropout: 1e-1      # YAML 1.1 would read text here
  colours: [红, 绿]
  optimizer: {rate: 3e-4, betas: [0.9, 1]}
empty:
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return read_recipe(tmp_path / "tiny.yaml")


def test_from_mapping_builds_settings_of_a_recipe(recipe):
    assert recipe["work"] == "runs/tiny"
    settings = from_mapping(Settings, section(recipe, "model"), WHERE)
    assert settings == Settings(
        num_layers=2, dropout=0.1, colours=("红", "绿"), optimizer=Optimizer(rate=3e-4, betas=(0.9, 1.0))
    )
    assert isinstance(settings.optimizer.betas[1], float)
    assert section(recipe, "empty") == {}


@pytest.mark.parametrize("text", ["1e-4", "1E4", "1.e+3", ".5e1", "-2e0", "+1.5e-8"])
def test_section_reads_numbers_with_an_exponent(text):
    assert section({"a": {}}, "a", [f"x={text}"]) == {"x": float(text)}


@pytest.mark.parametrize("text", ["e4", "1e", "1e4x", "v1e4"])
def test_section_keeps_words_with_an_e_as_text(text):
    assert section({"a": {}}, "a", [f"x={text}"]) == {"x": text}


def test_section_overrides_change_a_copy(recipe):
    changed = section(
        recipe,
        "model",
        [
            "num_layers=4",
            "name=大模型",
            "fused=false",
            "limit=null",
            "optimizer.rate=1e-4",
            "warm_up.rate=1",
            "sizes=[8, 16]",
        ],
    )
    settings = from_mapping(Settings, changed, WHERE)
    assert settings.num_layers == 4
    assert settings.name == "大模型"
    assert settings.fused is False
    assert settings.limit is None
    assert settings.optimizer == Optimizer(rate=1e-4, betas=(0.9, 1.0))
    assert settings.warm_up == Optimizer(rate=1.0)
    assert settings.sizes == [8, 16]
    assert section(recipe, "model", ["name=a=b"])["name"] == "a=b"
    assert recipe["model"]["num_layers"] == 2
    assert recipe["model"]["optimizer"]["rate"] == 3e-4


def test_from_mapping_roundtrips_through_json():
    settings = Settings(
        num_layers=3,
        checkpoint=12,
        limit=5,
        shape=(1, 2),
        folder=Path("runs/表情"),
        mix={"generate": 0.5, "caption": 1.0},
        sizes=[8],
        warm_up=Optimizer(rate=0.5),
        stages=(Optimizer(rate=0.1), Optimizer(betas=(0.5, 0.6))),
        notes={"seeds": [1, 2]},
    )
    plain = json.loads(json.dumps(to_mapping(settings), ensure_ascii=False))
    assert plain["stages"][1]["betas"] == [0.5, 0.6]
    assert from_mapping(Settings, plain, WHERE) == settings
    assert from_mapping(Settings, to_mapping(Settings(num_layers=1)), WHERE) == Settings(num_layers=1)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"num_layer": 2}, f'{WHERE}: "num_layer" is unknown; did you mean "num_layers"?'),
        ({"num_layers": 2, "zzz": 1}, f'{WHERE}: "zzz" is unknown; known: num_layers, width, name,'),
        ({}, f"{WHERE}: num_layers must be given"),
        ({"num_layers": "2"}, f'{WHERE}, num_layers: expected a whole number, got "2"'),
        ({"num_layers": 2.0}, f"{WHERE}, num_layers: expected a whole number, got 2.0"),
        ({"num_layers": True}, f"{WHERE}, num_layers: expected a whole number, got true"),
        ({"num_layers": None}, f"{WHERE}, num_layers: expected a whole number, got nothing"),
        ({"num_layers": 2, "name": 5}, f"{WHERE}, name: expected text, got 5"),
        ({"num_layers": 2, "dropout": "much"}, f'{WHERE}, dropout: expected a number, got "much"'),
        ({"num_layers": 2, "dropout": False}, f"{WHERE}, dropout: expected a number, got false"),
        ({"num_layers": 2, "fused": 1}, f"{WHERE}, fused: expected true or false, got 1"),
        ({"num_layers": 2, "folder": 1}, f"{WHERE}, folder: expected a path, got 1"),
        ({"num_layers": 2, "limit": "all"}, f'{WHERE}, limit: expected a whole number, got "all"'),
        (
            {"num_layers": 2, "checkpoint": [1]},
            f"{WHERE}, checkpoint: expected a whole number or text, got [1]",
        ),
        ({"num_layers": 2, "device": "gpu"}, f'{WHERE}, device: expected one of auto, cpu, cuda, got "gpu"'),
        ({"num_layers": 2, "colours": "红"}, f'{WHERE}, colours: expected a list of texts, got "红"'),
        ({"num_layers": 2, "colours": ["红", 3]}, f"{WHERE}, colours: expected text, got 3"),
        ({"num_layers": 2, "sizes": 8}, f"{WHERE}, sizes: expected a list of whole numbers, got 8"),
        ({"num_layers": 2, "mix": 8}, f"{WHERE}, mix: expected settings, got 8"),
        ({"num_layers": 2, "mix": {"sr": "half"}}, f'{WHERE}, mix, sr: expected a number, got "half"'),
        ({"num_layers": 2, "width": {"a": 1}}, f"{WHERE}, width: expected a whole number, got the settings a"),
        ({"num_layers": 2, "optimizer": 0.1}, f"{WHERE}, optimizer: expected settings, got 0.1"),
        (
            {"num_layers": 2, "optimizer": {"rat": 1}},
            f'{WHERE}, optimizer: "rat" is unknown; did you mean "rate"?',
        ),
        ({"num_layers": 2, "warm_up": {"betas": [1]}}, f"{WHERE}, warm_up, betas: expected a list of 2, got [1]"),
        ({"num_layers": 2, "width": 65}, f"{WHERE}: width 65 is no multiple of 8"),
    ],
)
def test_from_mapping_reports_invalid_settings(mapping, message):
    with pytest.raises(InputError) as caught:
        from_mapping(Settings, mapping, WHERE)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3), ("3", "3"), ("last", "last")], ids=["number", "digits", "word"]
)
def test_from_mapping_keeps_the_type_of_a_union_value(value, expected):
    built = from_mapping(Settings, {"num_layers": 1, "checkpoint": value}, WHERE).checkpoint
    assert built == expected
    assert type(built) is type(expected)


def test_read_recipe_reports_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the recipe .*none\.yaml: .*No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"work: a\nmodel:\n  width: [1, 2\n", r"bad\.yaml, line 4: expected ',' or ']'"),
        (b"model:\n  width: 1\n  depth: 2\n  width: 3\n", r'bad\.yaml, line 4: duplicate key "width"'),
        (b"model: !!python/object:os.system {}\n", r"bad\.yaml, line 1: could not determine a constructor"),
        (b"- a\n- b\n", r"bad\.yaml is no recipe: expected sections, got \['a', 'b'\]"),
        (b"", r"bad\.yaml is no recipe: expected sections, got nothing"),
        (b"model: \xff\xfe\n", r"cannot read the recipe .*bad\.yaml: .*UTF-8"),
        (b"model: \x07\n", r"bad\.yaml, .*special characters are not allowed"),
    ],
)
def test_read_recipe_reports_invalid_files(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("modle", [], 'the recipe has no section "modle"; it has: work, model, empty'),
        ("work", [], 'section "work" of the recipe: expected settings, got "runs/tiny"'),
        ("model", ["width"], 'the override "width": expected key=value'),
        ("model", ["=3"], 'the override "=3": expected key=value'),
        ("model", ["width=[1"], 'the override "width=[1": line 1: '),
        ("model", ["dropout.rate=1"], 'the override "dropout.rate=1": "dropout" is 0.1 and has no inner settings'),
    ],
)
def test_section_reports_invalid_names_and_overrides(recipe, name, overrides, message):
    with pytest.raises(InputError) as caught:
        section(recipe, name, overrides)
    assert str(caught.value).startswith(message)


# Renamed keys


def renamed_settings(new: str) -> type:
    """Return a dataclass with one field."""
    return make_dataclass("Renamed", [(new, Any)])


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_from_mapping_reads_old_name_of_key(old, new):
    assert vars(from_mapping(renamed_settings(new), {old: 3}, WHERE)) == {new: 3}


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_from_mapping_rejects_old_and_new_name_together(old, new):
    for mapping in ({old: 3, new: 4}, {new: 4, old: 3}):
        with pytest.raises(InputError) as caught:
            from_mapping(renamed_settings(new), mapping, WHERE)
        message = f'{WHERE}: "{old}" is the old name of "{new}", and both are given; keep "{new}"'
        assert str(caught.value) == message


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
@pytest.mark.parametrize("outer", ["", "training."])
def test_override_replaces_key_under_either_name(old, new, outer):
    """A recipe with one name and an override with the other set the same key, at the top and inside."""
    for in_recipe, in_override in ((old, old), (old, new), (new, old), (new, new)):
        content = {in_recipe: 3, "steps": 5}
        recipe = {"model": {"training": content} if outer else content}
        found = section(recipe, "model", [f"{outer}{in_override}=4"])
        assert (found["training"] if outer else found) == {new: 4, "steps": 5}
        assert content == {in_recipe: 3, "steps": 5}


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_override_reaches_into_settings_under_old_name(old, new):
    recipe = {"model": {old: {"rate": 1, "steps": 5}}}
    assert section(recipe, "model", [f"{new}.rate=2"]) == {new: {"rate": 2, "steps": 5}}
    assert section(recipe, "model", [f"{old}.rate=2"]) == {new: {"rate": 2, "steps": 5}}


def dataclasses_within(kind: Any) -> set[type]:
    """Return the dataclasses in a type, nested ones included."""
    found = {kind} if is_dataclass(kind) else set()
    inner = get_type_hints(kind).values() if found else get_args(kind)
    return found.union(*map(dataclasses_within, inner))


def test_settings_have_no_field_with_old_name():
    """Such a field could not be set: its name is read as the new one."""
    from cogview.checkpoints.registry import ModelEntry
    from cogview.emoji.datasets import SceneEncodeSettings
    from cogview.emoji.settings import WorldSettings
    from cogview.modeling.config import ModelConfig
    from cogview.training.settings import TransformerSettings
    from cogview.training.vqvae_recipe import VQVAERecipe

    roots = (ModelEntry, SceneEncodeSettings, WorldSettings, ModelConfig, TransformerSettings, VQVAERecipe)
    names = {setting.name for root in roots for kind in dataclasses_within(root) for setting in fields(kind)}
    assert names >= {"learning_rate", "num_workers", "grid"}  # nested dataclasses are found
    assert not names & RENAMED_KEYS.keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_from_mapping_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(InputError, match=r"sampling, temperature: expected a finite number, got"):
        from_mapping(Sampling, {"temperature": value}, where="sampling")


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_from_mapping_refuses_what_holds_no_settings(value):
    with pytest.raises(InputError, match="sampling must be settings with names, got"):
        from_mapping(Sampling, value, where="sampling")


def test_from_mapping_shortens_a_long_value_in_its_message():
    with pytest.raises(InputError) as caught:
        from_mapping(Sampling, {"temperature": "x" * 10_000}, where="sampling")
    assert len(str(caught.value)) < 300
