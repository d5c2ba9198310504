"""``cogview run``: what is checked before the first step, what counts as done, and which results depend on which."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from cogview.cli import package, run, steps
from cogview.cli.main import main
from cogview.cli.package_card import report_tables, unfinished_lines
from cogview.cli.steps import PACKAGE, check_step, encoded, packaged, sampled, steps_of
from cogview.config_io import to_mapping
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError
from cogview.training.recipe import Recipe
from cogview.training.step_records import read_records, record_step

PICTURES = {"pictures": ["pictures"]}
SECTIONS = {
    "work": "work",
    "text": {**PICTURES, "size": 300},
    "image": {**PICTURES, "training": {"steps": 2, "warmup_steps": 1}},
    "encode": {**PICTURES, "text_width": 12},
    "transformer": {"preset": "12m", "max_positions": 96, "training": {"steps": 2, "warmup_steps": 1}},
    "package": {},
}
COMMANDS = ["train-text", "train-image", "encode", "train", "eval samples", "package"]
RESULTS = ("text.model", "image/config.json", "image/model.safetensors", "image-run/x", "store/x", "held-out-store/x")


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """A recipe in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(yaml.safe_dump(SECTIONS), encoding="utf-8")
    return Recipe.open(Path("own.yaml"))


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The command lines of the steps, which are not run."""
    found: list[list[str]] = []
    monkeypatch.setattr(run, "run_words", lambda words: found.append(list(words)) or 0)
    return found


def run_recipe(capsys, *overrides: str) -> tuple[int, str]:
    """Run the recipe; return the exit status and stderr."""
    status = main(["run", "own.yaml", *overrides, "--device", "cpu"])
    return status, capsys.readouterr().err


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text.training.steps=7", 'section text of own.yaml: "training" is unknown'),
        ("package.training.steps=7", 'section package of own.yaml: "training" is unknown'),
        ("package.licence=3", "section package of own.yaml, licence: expected text, got 3"),
        ("package.card=missing.md", "the model card missing.md of own.yaml does not exist: looked for /"),
        ("image.sid=64", 'section image of own.yaml: "sid" is unknown; did you mean "side"?'),
    ],
)
def test_run_finds_mistakes_of_all_steps_before_the_first(recipe, asked, capsys, override, message):
    """A missing card stopped the run after hours of training."""
    status, err = run_recipe(capsys, override)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert not asked
    assert not Path("work").exists()


@pytest.mark.parametrize("command", ["train-text", "encode", "package", "scenes"])
def test_commands_refuse_steps_in_a_section_without_training(recipe, capsys, command):
    name = "emoji-cpu" if command == "scenes" else "own.yaml"
    assert main([command, name, "training.steps=7", "--work", "work"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert '"training" is unknown' in err


def test_package_takes_licence_and_data_of_the_command_line(recipe, asked, capsys, monkeypatch):
    """They were refused as keys of the section transformer."""
    found = []
    monkeypatch.setattr(package, "last_checkpoint", lambda recipe: Path("checkpoint"))
    monkeypatch.setattr(package, "package_picture_model", lambda recipe, settings, *rest: found.append(settings))
    assert main(["package", "own.yaml", "licence=Apache-2.0", "data=自己拍的照片"]) == 0
    assert (found[0].licence, found[0].data) == ("Apache-2.0", "自己拍的照片")
    record = json.loads(Path("work/steps.json").read_text(encoding="utf-8"))["package"]
    assert record["settings"]["package"]["licence"] == "Apache-2.0"
    (Path("work/model")).rmdir()
    assert run_recipe(capsys, "package.licence=Apache-2.0")[0] == 0
    assert asked[-1][:3] == ["package", "own.yaml", "licence=Apache-2.0"]


@pytest.mark.parametrize("command", [["encode"], ["train"], ["eval", "samples"]])
def test_commands_notice_first_that_the_held_out_store_is_missing(recipe, capsys, command):
    """A deleted store was missed after the model had been loaded, and advised to encode into a store that exists."""
    plant(recipe.work, "store/data.mdb")
    assert main([*command, "own.yaml", "--device", "cpu"]) == 2
    name = "eval" if command[0] == "eval" else command[0]
    err = capsys.readouterr().err
    assert err.startswith(f"cogview {name}")
    assert err.endswith(
        ": work/store is there, but the held-out store work/held-out-store is missing: encode both anew after rm -r "
        "work/store; of few pictures, hold out a larger share (encode.held_out)\n"
    )


def test_encoded_needs_the_held_out_store_that_training_evaluates_on(recipe):
    def write(path: Path) -> None:
        header = StoreHeader(
            fields={"text": 2, "image": 16},
            grid=4,
            num_image_codes=8,
            num_text_pieces=9,
            layouts=("generate",),
            codebook_sha256="c0de" * 16,
            text_sha256="7e47" * 16,
        )
        rows = {"text": np.zeros((1, 2), dtype=np.uint16), "image": np.zeros((1, 16), dtype=np.uint16)}
        with StoreWriter(path, header) as writer:
            writer.append(rows)

    write(recipe.store)
    assert not encoded(recipe)
    others = {**SECTIONS["transformer"], "store": "others", "validation_store": "held-out-others"}
    assert encoded(replace(recipe, sections={**SECTIONS, "transformer": others}))
    write(recipe.held_out_store)
    assert encoded(recipe)


def test_run_passes_sampling_settings_of_the_command_line_to_the_package(recipe, asked, capsys, monkeypatch):
    """They reached the training alone, and the package had those of the recipe."""
    assert run_recipe(capsys, "transformer.sampling.top_k=7")[0] == 0
    assert [words for words in asked if "transformer.sampling.top_k=7" in words] == [asked[2], asked[5]]
    assert [words for words in asked if "sampling.top_k=7" in words] == [asked[3], asked[4]]
    found = []
    monkeypatch.setattr(package, "last_checkpoint", lambda recipe: Path("checkpoint"))
    monkeypatch.setattr(
        package, "package_picture_model", lambda recipe, *rest: found.append(package.sampling_of(recipe))
    )
    assert main(asked[5]) == 0
    assert found[0].top_k == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scenes": {"things": 6}}, "a model of the emoji world has those that cogview eval scenes --tune finds"),
        (
            {"transformer": {**SECTIONS["transformer"], "init_from": "cogview-emoji", "lora": {"rank": 2}}},
            "an adapter has none, its base model has",
        ),
    ],
)
def test_run_refuses_sampling_settings_that_would_not_reach_the_package(recipe, asked, capsys, changes, reason):
    Path("own.yaml").write_text(yaml.safe_dump({**SECTIONS, **changes}), encoding="utf-8")
    status, err = run_recipe(capsys, "transformer.sampling.top_k=7")
    assert (status, asked) == (2, [])
    assert f"transformer.sampling.top_k=7: sampling settings do not reach the package, {reason}; leave them out" in err


@pytest.mark.parametrize("content", ["{}", "[", None])
def test_run_goes_on_with_a_damaged_list_of_times(recipe, asked, capsys, content):
    """A step that was done hours ago was reported as failed, by a file that nothing reads."""
    times = Path("work/times.json")
    times.parent.mkdir()
    times.mkdir() if content is None else times.write_text(content)
    status, err = run_recipe(capsys)
    assert status == 0
    assert err.count("note: work/times.json is no list of times") == 1
    assert [entry["step"] for entry in json.loads(times.read_text())] == COMMANDS
    aside = Path("work/times.json.damaged")
    assert aside.is_dir() if content is None else aside.read_text() == content
    times.write_text("[]]")
    assert run_recipe(capsys)[0] == 0
    assert Path("work/times.json.damaged2").read_text() == "[]]"


@pytest.mark.parametrize("content", ["[]", "{", '{"train": {"order": "x"}}', None])
def test_run_names_the_remedy_for_damaged_records(recipe, asked, capsys, content):
    records = Path("work/steps.json")
    records.parent.mkdir()
    records.mkdir() if content is None else records.write_text(content)
    status, err = run_recipe(capsys)
    assert (status, err.count("\n"), asked) == (2, 1, [])
    assert "the records of steps cannot be read; move work/steps.json away, results are kept" in err


@pytest.mark.parametrize(("size", "rank"), [("abc", "0"), ("", "0"), ("0", "0"), ("1", "x")])
def test_run_refuses_a_wrong_number_of_processes(recipe, capsys, monkeypatch, size, rank):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    status, err = run_recipe(capsys)
    assert (status, err.count("\n")) == (2, 1)
    expected = "RANK is 'x', expected a whole number" if rank == "x" else f'WORLD_SIZE "{size}" must be whole numbers'
    assert expected in err


MODEL = ("config.json", "model.safetensors", "text.model", "image/config.json", "image/model.safetensors")


@pytest.mark.parametrize(
    ("folder", "names"),
    [("model", MODEL), ("adapter", ("adapter_config.json", "adapter_model.safetensors", "cogview.json"))],
)
def test_package_is_done_with_all_its_files(recipe, folder, names):
    """A model without its config was taken as done."""
    if folder == "adapter":
        transformer = {**SECTIONS["transformer"], "init_from": "cogview-base", "lora": {}}
        recipe = replace(recipe, sections={**SECTIONS, "transformer": transformer})
    assert not packaged(recipe)
    plant(recipe.work / folder, *names)
    assert packaged(recipe)
    for name in names:
        (recipe.work / folder / name).unlink()
        assert not packaged(recipe), name
        plant(recipe.work / folder, name)


def test_run_takes_a_step_as_done_with_all_its_files(recipe, monkeypatch):
    plant(recipe.image_tokenizer, "config.json")
    assert not steps.IMAGE.done(recipe)
    plant(recipe.image_tokenizer, "model.safetensors")
    assert steps.IMAGE.done(recipe)
    recipe.store.mkdir()
    assert not encoded(recipe), "the store has no data"
    monkeypatch.setattr(steps, "graded", lambda measure, recipe: True)
    assert not sampled(recipe), "the sheet is missing"
    plant(recipe.work, "report/samples.png")
    assert sampled(recipe)


def test_check_step_spares_the_image_training_of_another_text_tokenizer(recipe):
    """A missing text tokenizer asked for the removal of the image tokenizer, which never reads a text."""
    recipe.work.mkdir()
    plant(recipe.work, *RESULTS, "transformer-run/x")
    found = steps_of(recipe)
    assert [step.command for step in found] == COMMANDS
    for step in found:
        record_step(recipe, step.command, step.recorded_settings(recipe))
    record_step(recipe, "train-text", {**found[0].recorded_settings(recipe).__dict__, "size": 301})
    assert check_step(recipe, found, 1, read_records(recipe)) == ""
    with pytest.raises(InputError) as caught:
        check_step(recipe, found, 2, read_records(recipe))
    assert str(caught.value) == (
        "step encode was done before step train-text was done again; do this step and those that depend on it anew "
        "after: rm -r work/store work/held-out-store work/transformer-run"
    )
    changed = replace(recipe, overrides_by_section={"text": ("size=302",)})
    with pytest.raises(
        InputError, match=r"rm -r work/text\.model work/store work/held-out-store work/transformer-run$"
    ):
        check_step(changed, steps_of(changed), 0, read_records(recipe))
    assert PACKAGE.needs is None, "a package depends on all steps"


def test_run_keeps_what_depends_on_an_equal_text_tokenizer(recipe, asked, capsys, monkeypatch):
    """A text tokenizer that is made again, byte for byte, changes nothing after it."""
    recipe.work.mkdir()
    plant(recipe.work, "text.model")
    text = steps.TEXT
    record_step(recipe, "train-text", text.recorded_settings(recipe), recipe.text_model)
    record_step(recipe, "encode", steps.ENCODE.recorded_settings(recipe))
    recipe.text_model.unlink()

    def make(words):
        if words[0] == "train-text":
            plant(recipe.work, "text.model")
            record_step(recipe, "train-text", text.recorded_settings(recipe), recipe.text_model)
            return 0
        return 2

    monkeypatch.setattr(run, "run_words", make)
    run_recipe(capsys)
    records = read_records(recipe)
    assert records["train-text"].order < records["encode"].order


def test_run_refuses_a_section_whose_name_is_misspelt(recipe, asked, capsys):
    """Without the check the transformer would be left out, after hours, in silence."""
    sections = {("transfomer" if name == "transformer" else name): content for name, content in SECTIONS.items()}
    Path("own.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    status, error = run_recipe(capsys)
    assert (status, asked) == (2, [])
    assert 'own.yaml: "transfomer" is unknown; did you mean "transformer"?' in error
    assert not Path("work").exists()


def test_run_asks_for_peft_before_the_first_step(recipe, asked, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    transformer = {**SECTIONS["transformer"], "init_from": "cogview-emoji", "lora": {"rank": 4}}
    Path("own.yaml").write_text(yaml.safe_dump({**SECTIONS, "transformer": transformer}), encoding="utf-8")
    status, err = run_recipe(capsys)
    assert (status, asked, err.count("\n")) == (2, [], 1)
    assert "PEFT, which is missing: pip install 'cogview[lora]'" in err


def plant_run(folder: Path, settings, steps: int) -> None:
    """Plant a run folder with the settings of a recipe and a checkpoint after some steps."""
    plant(folder, f"checkpoints/step-{steps:08d}/x")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(to_mapping(settings)), encoding="utf-8")


def plant_trial(recipe: Recipe, done: int, *overrides: str) -> None:
    """Plant the results of a run with overrides whose transformer was trained for some steps."""
    changed = replace(recipe, overrides_by_section=run.split_overrides(overrides))
    plant(recipe.work, *RESULTS)
    for step in steps_of(changed)[:4]:
        record_step(changed, step.command, step.recorded_settings(changed))
    plant_run(recipe.transformer_run, steps.transformer_settings(changed), done)


def test_run_names_the_settings_of_the_last_command_line(recipe, asked, capsys):
    """Without the KEY=VALUE of the first command, the second one offered to remove everything."""
    plant_trial(recipe, 40, "transformer.training.steps=40", "text.size=300")
    status, err = run_recipe(capsys)
    assert (status, [words[0] for words in asked]) == (2, ["encode"])
    assert err.splitlines()[-1] == (
        "cogview run: the settings of step train have changed: training.steps 40 -> 2; the last command line had "
        "transformer.training.steps=40 text.size=300, with which it goes on: cogview run own.yaml "
        "transformer.training.steps=40 text.size=300; or do it and what depends on it anew after: "
        "rm -r work/transformer-run"
    )
    assert run_recipe(capsys, "transformer.training.steps=40", "text.size=300")[0] == 0


def test_run_ends_a_training_early_and_keeps_it(recipe, asked, capsys):
    """A training of days can be ended: as many steps as are done, or fewer, are its end."""
    plant_trial(recipe, 30, "transformer.training.steps=40")
    ending = "cogview run own.yaml transformer.training.steps=30"
    status, err = run_recipe(capsys, "transformer.training.steps=35")
    assert (status, [words[0] for words in asked]) == (2, ["encode"])
    assert f"; to end the training after its 30 steps: {ending}; or do it" in err
    before = (recipe.transformer_run / "recipe.yaml").read_bytes()
    for given in (30, 20):
        status, err = run_recipe(capsys, f"transformer.training.steps={given}")
        assert status == 0
        assert "step 4 of 6, train: ended after 30 of 40 steps" in err
    assert "train" not in {words[0] for words in asked}
    assert (recipe.transformer_run / "recipe.yaml").read_bytes() == before
    asked.clear()
    assert run_recipe(capsys, "transformer.training.steps=40")[0] == 0
    assert "train" in {words[0] for words in asked}, "the training can go on after all"
    status, err = run_recipe(capsys, "transformer.training.steps=20", "transformer.training.learning_rate=0.5")
    assert status == 2, "other settings than the steps are those of another model"
    assert "learning_rate" in err
    assert "to end the training" not in err


@pytest.mark.parametrize(("done", "ends"), [(1, False), (7, False), (8, True), (9, True)])
@pytest.mark.parametrize("step", [steps.IMAGE, steps.TRAIN], ids=lambda step: step.command)
def test_run_does_not_end_a_training_in_its_warmup(recipe, asked, capsys, step, done, ends):
    """The image tokenizer of a training that was ended in its warm-up had a codebook of random numbers."""
    key = f"{step.section}.training"
    given = (f"{key}.steps=40", f"{key}.warmup_steps=8")
    plant_trial(recipe, 40, *given)
    (recipe.image_tokenizer / "model.safetensors").unlink()
    (recipe.transformer_run / "checkpoints/step-00000040/x").unlink()
    (recipe.transformer_run / "checkpoints/step-00000040").rmdir()
    changed = replace(recipe, overrides_by_section=run.split_overrides(given))
    plant_run(step.run_folder(recipe), step.settings(changed), done)
    status, err = run_recipe(capsys, f"{key}.steps=10")
    assert (status, f"to end the training after its {done} steps: " in err) == (2, ends)
    assert run_recipe(capsys, f"{key}.steps={max(2, done)}")[0] == (0 if ends else 2)


def test_run_refuses_fewer_steps_for_a_finished_training(recipe, asked, capsys):
    """It was trained by the schedule of more steps: that of fewer gives another model."""
    plant_trial(recipe, 40, "transformer.training.steps=40")
    status, err = run_recipe(capsys, "transformer.training.steps=20")
    assert (status, [words[0] for words in asked]) == (2, ["encode"])
    assert "training.steps 40 -> 20" in err
    assert "to end the training" not in err


def test_run_says_how_to_end_a_stopped_training(recipe, capsys, monkeypatch):
    def stop(words):
        if words[0] == "train":
            plant_run(recipe.transformer_run, steps.transformer_settings(replace(recipe, sections=longer)), 7)
            return 130
        return 0

    training = {"training": {"steps": 50, "warmup_steps": 1}}
    longer = {**SECTIONS, "transformer": {**SECTIONS["transformer"], **training}}
    monkeypatch.setattr(run, "run_words", stop)
    status, err = run_recipe(capsys, "transformer.training.steps=50")
    assert status == 130
    assert err.splitlines()[-1] == (
        "to end the training after its 7 steps: cogview run own.yaml transformer.training.steps=7"
    )


def test_package_says_that_the_training_is_not_finished(recipe):
    assert unfinished_lines(recipe) == []
    plant_trial(recipe, 30, "transformer.training.steps=40")
    assert unfinished_lines(recipe) == ["training of the transformer not finished: 30 of 40 steps are done"]
    assert report_tables(recipe, None).startswith("training of the transformer not finished: 30 of 40 steps are done\n")
    plant_trial(recipe, 40, "transformer.training.steps=40")
    assert unfinished_lines(recipe) == []
