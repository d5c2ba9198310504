"""Commands of ``cogview data``: stores from pictures, what is printed, and what is refused."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cogview.cli.main import main
from cogview.data.store import TokenStore
from cogview.modeling import config


@pytest.fixture
def data(tiny_checkpoint, tmp_path, monkeypatch, capsys, save_image):
    """Return a function that runs ``cogview data`` in a folder with ``pictures``: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        save_image(f"pictures/{number}.png", number)
        Path(f"pictures/{number}.txt").write_text(f"{'红蓝绿黄'[number % 4]}色的狐狸\n", encoding="utf-8")

    def run(name, *arguments):
        if name == "build":
            arguments = ("--model", str(tiny_checkpoint), "--device", "cpu", "--workers", "0", *arguments)
        status = main(["data", name, *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.mark.slow
def test_data_build_writes_stores_for_training(data, tiny_checkpoint, monkeypatch, capsys):
    """The stores of a folder of pictures go into ``cogview train``, and the model draws."""
    assert data("build", "pictures", "-o", "out/store", "--held-out", "0.1") == (
        0,
        ["out/store: 6 rows of 6 pictures", "out/store-held-out: 2 rows of 2 pictures"],
        ["8 entries: 6 pictures to train on, 2 held out, 0 left out"],
    )
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    recipe = {
        "preset": "tiny",
        "max_positions": 96,
        "tokenizers": str(tiny_checkpoint),
        "store": "out/store",
        "validation_store": "out/store-held-out",
        "training": {"steps": 2, "batch_size": 2, "warmup_steps": 1, "tasks": {"generate": 1, "upscale": 1}},
        "run": {"log_every": 1, "save_every": 2, "evaluate_every": 1},
        "precision": "float32",
    }
    Path("tiny.yaml").write_text(yaml.safe_dump({"work": "run", "transformer": recipe}), encoding="utf-8")
    assert main(["train", "tiny.yaml", "--device", "cpu"]) == 0, capsys.readouterr().err
    model = "run/transformer-run/checkpoints/step-00000002"
    assert main(["generate", "红色的狐狸", "--model", model, "--device", "cpu", "--seed", "1"]) == 0
    assert len(list(Path("outputs").glob("*.png"))) == 1


def test_data_build_reports_what_is_left_out(data):
    Path("pictures/1.png").write_bytes(b"nothing")
    Path("pictures/2.txt").unlink()
    status, out, err = data("build", "pictures", "-o", "store", "--held-out", "0")
    assert (status, out) == (1, ["store: 6 rows of 6 pictures"])
    assert err == [
        "8 entries: 6 pictures to train on, 0 held out, 2 left out",
        "left out: 2, listed in store-left-out.jsonl",
        "failed: pictures/1.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
    ]
    lines = Path("store-left-out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["pictures/1.png", "pictures/2.png"]


def test_data_build_goes_on_beyond_an_archive_that_is_cut(data):
    """An archive that was cut within its first member ended the command, and nothing was built of the others."""
    with tarfile.open("cut.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add("pictures/0.png", arcname="0.png")
    Path("cut.tar").write_bytes(Path("cut.tar").read_bytes()[:530])
    Path("empty.tar").touch()
    status, out, _ = data("build", "cut.tar", "empty.tar", "pictures", "-o", "store", "--held-out", "0")
    assert (status, out) == (1, ["store: 8 rows of 8 pictures"])
    size = Path("pictures/0.png").stat().st_size
    assert [json.loads(line) for line in Path("store-left-out.jsonl").read_text(encoding="utf-8").splitlines()] == [
        {"file": "cut.tar/0.png", "reason": f"the archive is cut off within it, after 18 of {size} bytes"},
        {"file": "empty.tar", "reason": "the archive is cut off or damaged at its end"},
    ]


def test_data_build_takes_several_sources_and_says_what_it_guesses(data, save_image):
    save_image("more/a.png", 9)
    Path("list.csv").write_text("path,text\nmore/a.png,黄色的狗\n", encoding="utf-8")
    status, out, err = data("build", "pictures", "list.csv", "-o", "store", "--held-out", "0", "--fit", "pad")
    assert (status, out) == (0, ["store: 9 rows of 9 pictures"])
    assert err == [
        'note: list.csv: pictures in "path", captions in "text"',
        "9 entries: 9 pictures to train on, 0 held out, 0 left out",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "-o", "s"), "the source nothing does not exist; expected a folder, .csv, .tsv"),
        (("pictures/0.png", "-o", "s"), 'pictures/0.png: the suffix ".png" is unknown; expected a folder'),
        (("pictures", "-o", "s", "--held-out", "1"), "1.0 is not in the range 0<=x<1"),
        (("pictures", "-o", "pictures"), "pictures is there already: remove it, or choose another store with -o"),
        (("pictures", "-o", "link"), "link is there already: remove it, or choose another store with -o"),
        (("pictures", "-o", "."), ". is there already: choose another store with -o"),
        (("pictures", "-o", "s", "--model", "none"), "none"),
        (("pictures", "-o", "s", "--model", "tokenizers"), "tokenizers has tokenizers, but no model: `cogview encode"),
    ],
)
def test_data_build_refuses_in_one_line(data, arguments, message):
    Path("tokenizers/image").mkdir(parents=True)
    Path("link").symlink_to("nowhere")
    status, out, err = data("build", *arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not [name for name in os.listdir(".") if name.startswith("s") or name.endswith(".building")]


@pytest.fixture
def store(data, tiny_checkpoint):
    """Build a store of six pictures, one of them with two captions, and return the option for its model."""
    Path("pictures/0.txt").write_text("红色的狐狸\n一只狐狸\n", encoding="utf-8")
    assert data("build", "pictures", "-o", "store", "--held-out", "0.1")[0] == 0
    return ("--model", str(tiny_checkpoint))


def test_data_inspect_saves_a_sheet_of_decoded_rows(data, store):
    status, out, err = data("inspect", "store", *store, "-n", "4", "--device", "cpu", "-o", "out/sheet.png")
    assert (status, out) == (0, ["out/sheet.png"]), err
    with Image.open("out/sheet.png") as sheet:
        assert sheet.width * sheet.height > 4 * 128**2
        assert sheet.text["rows"] == "0 1 2 3"
    assert data("inspect", "store", *store, "-n", "3", "--seed", "1", "--device", "cpu")[1] == ["sheet.png"]


def test_data_stats_counts_texts_codes_and_copies(data, store):
    status, out, err = data("stats", "store", *store)
    assert (status, err) == (0, [])
    assert out[0] == "rows: 7"
    assert out[1] == "fields: text 20, image 64, large 256, small 16; grid 8"
    assert out[2] == "tasks: generate, caption, upscale, low_level"
    assert "distinct: 5 texts, 6 images" in out
    assert out[-2:] == ["       2  绿色的狐狸", "       2  黄色的狐狸"]
    facts = json.loads(data("stats", "store", "--json")[1][0])
    assert (facts["rows"], facts["repeated_rows"], facts["byte_share"], facts["frequent"]) == (7, 0, None, [])


def test_data_merge_writes_the_rows_of_all_stores(data, store):
    assert data("merge", "store", "store-held-out", "-o", "all") == (0, ["all: 9 rows"], [])
    stores = [TokenStore(name) for name in ("store", "store-held-out", "all")]
    parts = [each.read(range(len(each)))["image"] for each in stores]
    assert np.array_equal(np.concatenate(parts[:2]), parts[2])
    assert stores[2].header.provenance == {"merged": [each.header.provenance for each in stores[:2]]}
    status, _, err = data("merge", "store", "./store", "-o", "twice")
    assert (status, err) == (
        2,
        ["cogview data: one store is given more than once (store, store): its rows would be doubled"],
    )
    status, _, err = data("merge", "store", "-o", "all")
    assert (status, err) == (2, ["cogview data: all is there already: remove it, or choose another folder with -o"])


def test_data_validate_locates_a_flipped_byte(data, store):
    """LMDB maps a damaged page without a word, or ends the process by a signal."""
    status, out, _ = data("validate", "store", "store-held-out")
    assert (status, out) == (0, ["store: 7 rows in 1 block, no damage", "store-held-out: 2 rows in 1 block, no damage"])
    content = bytearray(Path("store/data.mdb").read_bytes())
    content[len(content) // 2] ^= 1
    Path("store/data.mdb").write_bytes(content)
    status, out, err = data("validate", "store", "store-held-out")
    assert status == 1
    assert out[0] == f"store: block 0 of 1 is damaged: bytes 0 to {len(content) - 1:,}, about rows 0 to 6"
    assert out[1] == "store-held-out: 2 rows in 1 block, no damage"
    assert err == ["store is damaged: copy it again, or build it again"]
    Path("store/data.blocks.json").unlink()
    assert "the SHA-256 of data.mdb is" in data("validate", "store")[2][0]
    assert data("validate", "pictures") == (1, [], ["pictures is not a token store: it has no data.mdb"])
    status, _, err = data("validate", "store", "nowhere")
    assert (status, err) == (2, ["cogview data: there is no folder nowhere: expected the folders of token stores"])


@pytest.mark.parametrize(
    ("name", "more", "status"),
    [("stats", (), 2), ("validate", (), 1), ("merge", ("-o", "new"), 2), ("export", ("-o", "new"), 2)],
)
def test_data_commands_refuse_a_store_of_a_newer_version(data, store, name, more, status):
    import lmdb

    with lmdb.open("store", max_dbs=1) as environment, environment.begin(write=True) as transaction:
        header = json.loads(transaction.get(b"header"))
        transaction.put(b"header", json.dumps(header | {"format_version": 99}).encode())
    for file in ("data.sha256", "data.blocks.json"):
        Path("store", file).unlink()
    found, _, err = data(name, "store", *more, *(store if name == "export" else ()))
    assert found == status
    assert "it has format 99, this version reads up to 2: update cogview" in err[-1]
    assert not Path("new").exists()


def test_data_export_writes_shards_that_build_reads(data, store):
    status, out, err = data("export", "store", *store, "-o", "shards", "--shard-size", "4", "--device", "cpu")
    assert (status, out) == (0, ["shards: 6 pictures in 2 shards"]), err
    status, out, _ = data("build", "shards/000000.tar", "shards/000001.tar", "-o", "again", "--held-out", "0")
    assert (status, out) == (0, ["again: 7 rows of 6 pictures"])
    again, before = TokenStore("again"), TokenStore("store")
    assert np.array_equal(again.read(range(7))["text"], before.read(range(7))["text"])
    first = Path("shards/000000.tar").read_bytes()
    assert data("export", "store", *store, "-o", "other", "--shard-size", "4", "--device", "cpu")[0] == 0
    assert Path("other/000000.tar").read_bytes() == first


@pytest.mark.parametrize("name", ["inspect", "export"])
def test_data_commands_refuse_a_store_of_other_tokenizers(data, store, name):
    status, out, err = data(name, "store", "--model", "cogview-emoji", "-o", "x", "--device", "cpu")
    assert (status, out, len(err)) == (2, [], 1)
    assert "store was made with text_sha256" in err[0]
