"""Job lines of the tasks edit, fill and vary: results, resuming, and lines that cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.image_io.png import read_metadata
from cogview.jobs.records import digest, read_job

FOX, TURN = "一只狐狸在汽车的左边", "狐狸变成蓝色的狗"
LINES = [
    {"id": "a", "task": "edit", "image": "a.png", "prompt": TURN, "mask": "mask.png", "strength": 0.5, "n": 2},
    {"id": "b", "task": "fill", "image": "b.png", "prompt": FOX, "mask": "0,0,40,16"},
    {"id": "c", "task": "vary", "image": "a.png", "keep": 0.9, "seed": 3},
    {"id": "d", "prompt": FOX},
    {"id": "e", "task": "vary", "image": "b.png"},
    {"id": "f", "task": "edit", "image": "b.png", "prompt": TURN, "temperature": 0.5},
    {"id": "g", "task": "caption", "image": "a.png"},
]


@pytest.fixture
def run(run_command, edit_checkpoint, save_image):
    """Return a function that runs a job of lines beside images and a mask: (status, lines of stdout, stderr)."""
    save_image("a.png")
    save_image("b.png", 1)
    mask = Image.new("1", (64, 64))
    mask.paste(1, (16, 16, 40, 48))
    mask.save("mask.png")

    def run(lines, *arguments, output="out"):
        text = "\n".join(json.dumps(line) for line in lines)
        Path("job.jsonl").write_text(text, encoding="utf-8")
        options = ("--model", str(edit_checkpoint), "--seed", "7", "-o", output)
        return run_command("generate", "--input", "job.jsonl", *options, *arguments)

    return run


def codes(path):
    return np.array(read_metadata(path)["codes"].split(), dtype=int).reshape(8, 8)


def names(folder):
    return sorted(path.name for path in Path(folder).glob("*.png"))


def test_lines_make_what_python_makes(run, edit_model):
    """All tasks in one job, whose lines share batches."""
    status, _, err = run(LINES)
    assert status == 0, err
    expected = {
        "a": edit_model.edit("a.png", TURN, mask="mask.png", strength=0.5, n=2, seed=7),
        "b": edit_model.fill("b.png", FOX, mask="0,0,40,16", seed=7),
        "c": edit_model.vary("a.png", keep=0.9, n=1, seed=3),
        "d": edit_model.generate(FOX, seed=7),
        "e": edit_model.vary("b.png", n=1, seed=7),
        "f": edit_model.edit("b.png", TURN, seed=7, temperature=0.5),
    }
    files = {f"{name}-seed{image.seed}-{image.index}.png": image for name in expected for image in expected[name]}
    assert names("out") == sorted(files)
    for file, image in files.items():
        np.testing.assert_array_equal(codes(Path("out", file)), image.codes)
    texts = read_metadata(Path("out/a-seed7-1.png"))
    assert (texts["task"], texts["source"], texts["mask"], texts["strength"]) == ("edit", "a.png", "mask.png", "0.5")
    assert (texts["prompt"], texts["mask_codes"].count("1")) == (TURN, 12)
    texts = read_metadata(Path("out/b-seed7-0.png"))
    assert (texts["task"], texts["mask"]) == ("fill", "0,0,40,16")
    assert read_metadata(Path("out/c-seed3-0.png"))["keep"] == "0.9"


def test_files_of_lines_without_an_id_name_their_task(run):
    """As those of the commands do."""
    lines = [{key: value for key, value in line.items() if key != "id"} for line in LINES[:3]]
    assert run(lines)[0] == 0
    assert names("out") == ["a-edit-seed7-0.png", "a-edit-seed7-1.png", "a-vary-seed3-0.png", "b-fill-seed7-0.png"]


def test_results_are_the_same_in_batches_of_one(run):
    """And the journal says the same of them."""
    run(LINES)
    run(LINES, "--max-inference-batch-size", "1", output="one")
    assert names("one") == names("out")
    for name in names("out"):
        np.testing.assert_array_equal(codes(Path("one", name)), codes(Path("out", name)))


def test_resume_makes_what_is_missing_bit_for_bit(run):
    """A file that was lost, and lines that failed because an image did not exist yet."""
    mask = Path("mask.png").read_bytes()
    run(LINES, output="whole")
    Path("mask.png").unlink()
    status, _, err = run(LINES)
    assert status == 1
    assert "skipped: line 1: image mask.png does not exist\n" in err
    Path("out/b-seed7-0.png").unlink()
    Path("mask.png").write_bytes(mask)
    status, _, _ = run(LINES, "--resume")
    assert status == 0
    assert names("out") == names("whole")
    for name in names("out"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    status, lines, err = run(LINES, "--resume")
    assert (status, lines) == (0, [])
    assert "8 of 8 results exist already" in err


def test_equal_lines_continue_the_numbers_of_their_images(run):
    """Lines of another mask or share do not."""
    line = {"task": "vary", "image": "a.png"}
    assert run([line, line, line | {"keep": 0.6}, line | {"keep": 0.5, "id": "x"}])[0] == 0
    assert names("out") == ["a-vary-seed7-0.png", "a-vary-seed7-1.png", "a-vary_2-seed7-0.png", "x-seed7-2.png"]


def test_lines_that_cannot_be_used_are_recorded(run, tiny_checkpoint):
    """The others are made; the status is 1."""
    wrong = [
        ({"mask": "0,0,99,8"}, "mask: the box 0,0,99,8 reaches beyond the 64 x 64 pixels of a.png"),
        ({"mask": "1,2,3"}, 'mask: expected a box x,y,w,h in whole pixels, w and h from 1 on, got "1,2,3"'),
        ({"mask": "none.png"}, "image none.png does not exist"),
        ({"mask": "small.png"}, "mask: it is 8 x 8 pixels, and a.png is 64 x 64; expected the same size"),
        (
            {"mask": "black.png"},
            "mask: it is empty, so nothing would change; paint what may change in white, or o",
        ),
        (
            {"task": "fill", "mask": "0,0,64,64"},
            "mask: it covers the whole image, so nothing would be kept; cogview generate makes new images",
        ),
        ({"rank_by": "caption"}, "rank_by caption needs a prompt that describes the images of edit"),
    ]
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (64, 64), 0).save("black.png")
    base = {"task": "edit", "image": "a.png", "prompt": TURN}
    status, _, err = run([*(base | changes for changes, _ in wrong), LINES[2]])
    assert (status, names("out")) == (1, ["c-seed3-0.png"])
    for number, (_, message) in enumerate(wrong, start=1):
        assert f"skipped: line {number}: {message}" in err
    journal = [json.loads(line) for line in Path("out/job.ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["line"] for line in journal[1:] if "error" in line) == list(range(1, len(wrong) + 1))


def test_weights_without_the_task_refuse_the_line(run_command, save_image):
    """Here the only line, so that nothing can be done."""
    save_image("a.png")
    Path("job.jsonl").write_text('{"task": "vary", "image": "a.png"}', encoding="utf-8")
    status, _, err = run_command("generate", "--input", "job.jsonl")
    assert status == 2
    assert "line 1: " in err
    assert "was not trained for the task 'fill', which 'vary' needs; its tasks are: generate, caption" in err
    assert err.count("\n") == 1


def test_guidance_of_a_job_leaves_variations_alone(run, edit_model):
    """They have no text; the other lines are guided. A line that sets it itself is refused."""
    assert run([LINES[2], LINES[3]], "--guidance", "3")[0] == 0
    (varied,) = edit_model.vary("a.png", keep=0.9, n=1, seed=3)
    np.testing.assert_array_equal(codes("out/c-seed3-0.png"), varied.codes)
    assert read_metadata(Path("out/d-seed7-0.png"))["guidance"] == "3.0"
    status, _, err = run([LINES[2] | {"guidance": 3}, LINES[3]], output="other")
    assert status == 1
    assert "line 1: the task 'vary' has no text that could guide it: guidance must be 1, got 3" in err


def test_best_images_are_chosen_by_prompts_that_describe_them(run):
    """An instruction does not: its images are all kept, and all are on the contact sheet."""
    lines = [LINES[5] | {"n": 3}, LINES[1] | {"n": 3}]
    assert run(lines, "--keep", "1", "--rank-by", "caption", "--grid")[0] == 0
    kept = [name for name in names("out") if not name.startswith("grid")]
    assert [name[:1] for name in kept] == ["b", "f", "f", "f"]
    assert "rank" in read_metadata(Path("out", kept[0]))
    assert "grid-seed7.png" in names("out")


def test_digest_depends_on_the_mask_and_not_on_the_folder(tmp_path, monkeypatch):
    """A job file that is moved with its images is the same job; a box is no path."""
    monkeypatch.chdir(tmp_path)
    line = {"task": "edit", "image": "a.png", "prompt": TURN, "mask": "m.png"}

    def digest_of(folder, **changes):
        path = Path(folder, "job.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(line | changes), encoding="utf-8")
        records, problems = read_job(str(path))
        assert not problems
        return records[0].mask, digest(records, str(path))

    (mask, first), (moved, second) = digest_of("."), digest_of("moved")
    assert (mask, moved) == ("m.png", str(Path("moved/m.png")))
    assert first == second
    assert digest_of(".", mask="n.png")[1] != first
    assert digest_of("moved", mask="0,0,8,8") == digest_of(".", mask="0,0,8,8")
