"""``cogview recipes``: the recipes of an installed package."""

import yaml

from cogview.cli.main import main


def test_recipes_lists_names_with_their_first_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:2] == ["300m-one-gpu", "4b-512-gpus"]
    assert any(line.startswith("emoji-cpu ") and "two CPU cores" in line for line in lines)


def test_recipes_prints_a_recipe(capsys):
    """A copy to change: cogview recipes emoji-cpu > mine.yaml."""
    assert main(["recipes", "emoji-cpu"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["work"] == "runs/emoji-cpu"


def test_recipes_refuses_an_unknown_name(capsys):
    assert main(["recipes", "emoji-cp"]) == 2
    assert capsys.readouterr().err == (
        "cogview recipes: cannot read the recipe emoji-cp: No such file or directory; "
        'did you mean the packaged recipe "emoji-cpu"?\n'
    )
