"""``cogview train-image`` on pictures of one's own: what is trained, resumed, printed and refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.cli.main import main
from cogview.training import vqvae_initial
from cogview.training.vqvae_trainer import VQVAETrainer


@pytest.fixture
def train_image(tmp_path, monkeypatch, capsys, save_image):
    """Return a function that runs ``cogview train-image`` in a folder with ``pictures``: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        save_image(f"pictures/{number:02d}.png", number, (40 + number, 48))

    def run(*overrides, **image):
        section = {
            "pictures": ["pictures"],
            "side": 32,
            "held_out": 0.2,
            "model": {"channels": [4, 8, 8], "encoder_blocks": [0, 0, 1], "num_codes": 16, "code_width": 4},
            "training": {"steps": 6, "batch_size": 4, "warmup_steps": 2},
            "run": {"save_every": 2, "evaluate_every": 3, "log_every": 1},
            "precision": "float32",
            **image,
        }
        Path("own.yaml").write_text(yaml.safe_dump({"work": "work", "image": section}), encoding="utf-8")
        status = main(["train-image", "own.yaml", "--device", "cpu", *overrides])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), [line for line in printed.err.splitlines() if "step" not in line]

    return run


def weights(work: str = "work") -> bytes:
    return Path(work, "image/model.safetensors").read_bytes()


def test_train_image_trains_on_pictures_and_evaluates_on_held_out_ones(train_image):
    Path("pictures/broken.jpg").write_bytes(b"nothing")
    status, out, err = train_image(fit="pad", flip=True, scales=[1, 2])
    assert (status, out) == (0, ["work/image"])
    assert err[0] == "left out: 1, listed in work/pictures-left-out.jsonl"
    assert json.loads(Path("work/pictures-left-out.jsonl").read_text())["file"] == "pictures/broken.jpg"
    training, held_out = int(err[1].split()[2]), int(err[1].split()[6])
    assert err[1] == f"25 pictures: {training} to train on, {held_out} held out, 1 left out"
    assert training + held_out == 24
    assert held_out >= 2
    last = json.loads(Path("work/image-run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_images"] == held_out
    with Image.open("work/image-run/samples/step-00000006.png") as sheet:
        assert sheet.size == (held_out * 68 + 4, 2 * 68 + 4)  # pictures above their reconstructions
    assert load_image_tokenizer(Path("work/image")).config.num_codes == 16


@pytest.mark.multiprocess
def test_train_image_resumes_bit_for_bit_with_the_same_pictures(train_image, monkeypatch, save_image):
    """A picture that is added meanwhile must not change which ones the rest of the training sees."""
    step = VQVAETrainer.step

    def interrupted(self, number, batch):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, batch)

    assert train_image(flip=True)[0] == 0
    expected = weights()
    with monkeypatch.context() as patch:
        patch.setattr(VQVAETrainer, "step", interrupted)
        assert train_image("--work", "other", flip=True)[0] == 128 + signal.SIGTERM
    save_image("pictures/added.png", 99)
    status, _, err = train_image("--work", "other", "--resume", "auto", "num_workers=1", flip=True)
    assert status == 0
    assert len(err) == 1
    assert weights("other") == expected
    notes = train_image("--work", "other", "--resume", "auto", "pictures=[pictures, pictures/added.png]")[2]
    assert notes[0] == (
        "note: the pictures are listed anew, since the recipe names others than the training was started with"
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_workers", [0, 1])
def test_train_image_names_a_picture_that_is_changed_meanwhile(train_image, monkeypatch, save_image, num_workers):
    """Of a worker process the user saw the traceback; and the run would not have been repeatable."""
    step = VQVAETrainer.step

    def change(self, number, batch):
        if number == 0:
            for name in os.listdir("pictures"):
                os.utime(f"pictures/{name}", ns=(1, 1))
        return step(self, number, batch)

    monkeypatch.setattr(VQVAETrainer, "step", change)
    status, out, err = train_image(f"num_workers={num_workers}", "training.steps=40")
    assert (status, out) == (2, [])
    assert err[-1].startswith("cogview train-image: pictures/")
    assert err[-1].endswith(".png has been changed or removed since the training was started")
    assert len(err) == 2


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"pictures": ["none"]}, "the source none does not exist; expected a picture, a folder"),
        ({"pictures": ["pictures/00.png"]}, "of 1 pictures, none is held out with held_out: 0.2; change it, or add"),
        ({"side": 30}, "30 pixels do not divide into codes of 8 x 8 pixels; the nearest sides that fit: 24 and 32"),
        ({"fit": "fill"}, 'fit: expected one of crop, pad, stretch, got "fill"'),
        ({"held_out": 0.0}, "held_out must be in (0, 1), got 0.0"),
        ({"pictures": []}, "side applies to pictures, which are not given"),
    ],
)
def test_train_image_refuses_in_one_line(train_image, image, message):
    status, out, err = train_image(**image)
    assert (status, out) == (2, [])
    assert message in err[-1]
    assert len(err) <= 2
    assert not Path("work/image-run").exists()


def test_train_image_that_is_refused_keeps_the_pictures_of_the_run(train_image, save_image):
    """The list was written before the run was looked at, so the training that went on took other pictures."""
    assert train_image()[0] == 0
    listed = Path("work/pictures.jsonl").read_bytes()
    save_image("pictures/added.png", 99)
    assert train_image() == (2, [], [])  # the line of the refusal names a step, and the fixture leaves these out
    assert Path("work/pictures.jsonl").read_bytes() == listed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("precision=fp8",), "precision 'fp8' is unknown"),
        (("side=30",), "30 pixels do not divide into codes of 8 x 8 pixels"),
        (("init_from=work/image", "train=decoder", "model={num_codes: 24}"), "train: decoder keeps the codebook"),
    ],
)
def test_train_image_checks_settings_before_pictures_and_weights(train_image, monkeypatch, overrides, message):
    assert train_image()[0] == 0
    monkeypatch.setattr(vqvae_initial, "load_image_tokenizer", None)  # which a call would trip over
    for number in range(24):
        Path(f"pictures/{number:02d}.png").write_bytes(b"nothing")
    status, out, err = train_image("--work", "other", *overrides)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not Path("other").exists()
