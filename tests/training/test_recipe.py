"""Recipes: the settings of a section with overrides of the command line."""

from pathlib import Path

import pytest

from cogview.data.sources.open import open_source
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError
from cogview.training.recipe import Recipe, find_recipe, packaged_recipes
from cogview.training.settings import TransformerSettings
from cogview.training.vqvae_recipe import VQVAERecipe

EMOJI_CPU = Path(__file__).parents[2] / "scripts/recipes/emoji-cpu.yaml"


@pytest.mark.parametrize(
    ("kind", "section", "steps", "warmup_steps"),
    [
        (TransformerSettings, "transformer", 2, 1),  # 200 of 20,000 in the recipe
        (TransformerSettings, "transformer", 90, 9),
        (TransformerSettings, "transformer", 150, 15),
        (TransformerSettings, "transformer", 201, 20),
        (TransformerSettings, "transformer", 1999, 199),
        (TransformerSettings, "transformer", 2000, 200),
        (TransformerSettings, "transformer", 40000, 200),
        (VQVAERecipe, "image", 40, 4),  # 300, the default, of 6,500
    ],
)
def test_recipe_settings_bound_the_warmup_by_a_tenth_of_overridden_steps(kind, section, steps, warmup_steps, capsys):
    """Of a warm-up of 140 steps, a trial of 150 steps kept all, and one of 90 steps three."""
    settings = Recipe.open(EMOJI_CPU, overrides=(f"training.steps={steps}",)).settings(kind, section)
    assert (settings.training.steps, settings.training.warmup_steps) == (steps, warmup_steps)
    note = capsys.readouterr().err
    planned = {"transformer": 200, "image": 300}[section]
    expected = f"note: warmup_steps is {warmup_steps}, not {planned}: at most 10% of the {steps} steps"
    assert note.splitlines() == ([expected] if warmup_steps < planned else [])


@pytest.mark.parametrize(("steps", "warmup_steps"), [(100, 20), (299, 59), (300, 60), (900, 60)])
def test_recipe_settings_keep_a_larger_share_that_the_recipe_has(tmp_path, steps, warmup_steps):
    """The rule changes nothing about a recipe whose steps are overridden with the same number."""
    path = tmp_path / "own.yaml"
    path.write_text("work: x\ntransformer: {training: {steps: 300, warmup_steps: 60}}", encoding="utf-8")
    settings = Recipe.open(path, overrides=(f"training.steps={steps}",)).settings(TransformerSettings, "transformer")
    assert settings.training.warmup_steps == warmup_steps


@pytest.mark.parametrize("overrides", [("training.steps=100", "training.warmup_steps=100"), ("training.steps=1",)])
def test_recipe_settings_refuse_a_warmup_that_is_asked_for_and_too_long(overrides):
    recipe = Recipe.open(EMOJI_CPU, overrides=overrides)
    with pytest.raises(InputError, match="steps must be"):
        recipe.settings(TransformerSettings, "transformer")


def test_find_recipe_knows_packaged_recipes_by_name(tmp_path, monkeypatch):
    """An installed package has something to train; a file of the user comes first."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("emoji-cpu")).read_bytes() == EMOJI_CPU.read_bytes()
    assert set(packaged_recipes()) == {path.stem for path in EMOJI_CPU.parent.glob("*.yaml")}
    assert Recipe.open(Path("emoji-cpu")).work == Path("runs/emoji-cpu")
    (tmp_path / "emoji-cpu").write_text("work: mine")
    assert Recipe.open(Path("emoji-cpu")).work == Path("mine")


def test_find_recipe_names_the_recipe_in_a_folder(tmp_path):
    with pytest.raises(InputError, match=f"the recipe {tmp_path}: it is a folder; expected the YAML file of a recipe$"):
        find_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text("work: mine")
    with pytest.raises(InputError, match=f"the recipe {tmp_path}: it is a folder; it holds {tmp_path}/recipe.yaml$"):
        find_recipe(tmp_path)


def test_find_recipe_says_where_it_looked(tmp_path, monkeypatch):
    """A recipe was started in another folder than the one that its paths start at."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        find_recipe(Path("mine/recipe.yaml"))
    assert str(caught.value).endswith(
        f"; a path starts at the current folder, so it would be {tmp_path}/mine/recipe.yaml"
    )
    with pytest.raises(InputError) as caught:
        open_source(Path("pictures"), TableOptions(), str)
    assert str(caught.value).endswith(f"; a path starts at the current folder, so it would be {tmp_path}/pictures")
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "pictures", TableOptions(), str)
    assert "current folder" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "emoji-cp",
            'cannot read the recipe emoji-cp: No such file or directory; did you mean the packaged recipe "emoji-cpu"?',
        ),
        ("scripts/recipes/emoji-cpu.yaml", 'did you mean the packaged recipe "emoji-cpu"?'),
        (
            "天空",
            "cannot read the recipe 天空: No such file or directory; packaged recipes are: 300m-one-gpu, 4b-512-gpus",
        ),
    ],
)
def test_find_recipe_suggests_a_packaged_recipe(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        find_recipe(Path(name))
    assert message in str(caught.value)
