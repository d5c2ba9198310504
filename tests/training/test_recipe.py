"""Recipes: the settings of a section with overrides of the command line."""

from pathlib import Path

import pytest

from cogview.errors import InputError
from cogview.training.recipe import Recipe, find_recipe, packaged_recipes
from cogview.training.settings import TransformerSettings
from cogview.training.vqvae_recipe import VQVAERecipe

EMOJI_CPU = Path(__file__).parents[2] / "scripts/recipes/emoji-cpu.yaml"


@pytest.mark.parametrize(
    ("kind", "section", "steps", "warmup_steps"),
    [
        (TransformerSettings, "transformer", 100, 1),  # 200 of 20,000 in the recipe
        (TransformerSettings, "transformer", 201, 200),
        (TransformerSettings, "transformer", 40000, 200),
        (VQVAERecipe, "image", 40, 2),  # 300, the default, of 6,500
    ],
)
def test_recipe_settings_keep_the_share_of_the_warmup_when_steps_are_overridden(
    kind, section, steps, warmup_steps, capsys
):
    """A recipe is tried with few steps by one override, although its warm-up is longer than the trial."""
    settings = Recipe.open(EMOJI_CPU, overrides=(f"training.steps={steps}",)).settings(kind, section)
    assert (settings.training.steps, settings.training.warmup_steps) == (steps, warmup_steps)
    note = capsys.readouterr().err
    assert note.startswith(f"note: warmup_steps is {warmup_steps}, ") if steps <= 200 else not note


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
