"""``CogView.edit``, ``fill`` and ``vary``: what stays, what is generated, and that results depend on nothing else."""

import numpy as np
import pytest
from PIL import Image

from cogview.modeling.config import Sampling
from cogview.pipeline import runner
from cogview.pipeline.masks import load_mask, sample_changes
from cogview.pipeline.programs import ProgramBuilder
from cogview.pipeline.requests import GenerationRequest
from tests.factories import input_error

FOX, TURN, SWAP = "一只狐狸在汽车的左边", "把狐狸变成狗", "背景变成蓝色"
BOX = (16, 16, 24, 32)
SAMPLING = Sampling(temperature=1.1, top_k=60)


@pytest.fixture(scope="module")
def images(edit_model):
    """Return three images of random weights."""
    return edit_model.generate(FOX, n=3, seed=5)


@pytest.fixture(scope="module")
def changeable(edit_model):
    """Return the codes that ``BOX`` covers."""
    return edit_model.fit_mask(load_mask(BOX), (64, 64))


def codes_of(results):
    return [one.codes.tolist() for one in results]


def request(task, codes, seed=7, index=0, **facts):
    prompt = "" if task == "vary" else TURN
    return GenerationRequest(task=task, prompt=prompt, codes=codes, seed=seed, index=index, sampling=SAMPLING, **facts)


def sequence_of(model, made):
    """Return codes of source and image of the first sequence, -1 for [MASK] and blanks, and its text ids."""
    (step,) = ProgramBuilder(model.context).build(made).pending()
    parts = {}
    for name in ("source", "image"):
        ids = step.sequence.ids[step.sequence.spans[name]].reshape(8, 8)
        parts[name] = np.where(ids < model.vocabulary.num_image_codes, ids, -1)
    return parts["source"], parts["image"], step.sequence.ids[step.sequence.spans["text"]]


def test_edit_reads_the_whole_source_and_generates_the_mask(edit_model, images, changeable):
    """The source is known in full; outside of the mask the result is given."""
    codes = images[0].codes
    source, image, text = sequence_of(edit_model, request("edit", codes, mask=changeable))
    np.testing.assert_array_equal(source, codes)
    np.testing.assert_array_equal(image, np.where(changeable, -1, codes))
    assert (
        text.tolist() == (np.array(edit_model.text_tokenizer.encode(TURN)) + edit_model.vocabulary.text.start).tolist()
    )
    source, image, _ = sequence_of(edit_model, request("edit", codes))
    np.testing.assert_array_equal(source, codes)
    assert (image == -1).all()


@pytest.mark.parametrize("task", ["fill", "vary"])
def test_fill_hides_in_the_source_what_it_generates(edit_model, images, changeable, task):
    """Else it would only have to copy it. A variation has no text."""
    codes = images[0].codes
    source, image, text = sequence_of(edit_model, request(task, codes, mask=changeable))
    np.testing.assert_array_equal(source, np.where(changeable, -1, codes))
    np.testing.assert_array_equal(image, source)
    assert len(text) == (0 if task == "vary" else len(edit_model.text_tokenizer.encode(TURN)))


def test_images_of_one_request_keep_other_codes(edit_model, images):
    """Sequences of different kept codes are not shared between consecutive requests."""
    builder, codes = ProgramBuilder(edit_model.context), images[0].codes
    for index in (0, 1, 0):
        (step,) = builder.build(request("vary", codes, index=index, strength=0.5)).pending()
        expected = sample_changes(np.ones((8, 8), dtype=bool), 0.5, seed=7, index=index)
        np.testing.assert_array_equal(step.sequence.blanks[step.sequence.spans["image"]].reshape(8, 8), expected)


def test_edit_keeps_the_codes_outside_of_the_mask(edit_model, images, changeable):
    """Bit for bit, for every image and index; what changed is inside."""
    edited = edit_model.edit(images, TURN, mask=BOX, n=2, seed=7, sampling=SAMPLING)
    assert [(one.task, one.prompt, one.seed, one.index) for one in edited] == [
        ("edit", TURN, 7, index) for _ in images for index in (0, 1)
    ]
    for one, image in zip(edited, np.repeat(np.arange(3), 2), strict=True):
        same = one.codes == images[image].codes
        assert same[~changeable].all()
        assert not same[changeable].all()
        np.testing.assert_array_equal(np.asarray(one), edit_model.decode_images(one.codes))


def test_fill_keeps_the_codes_outside_of_the_mask(edit_model, images, changeable):
    """With the prompts of generated images, and a mask for each image."""
    masks = [BOX, ~changeable, "0,0,64,8"]
    filled = edit_model.fill(images, mask=masks, seed=7, sampling=SAMPLING)
    top = np.repeat(np.arange(8) < 1, 8).reshape(8, 8)
    for one, image, mask in zip(filled, images, (changeable, ~changeable, top), strict=True):
        assert (one.prompt, one.task) == (FOX, "fill")
        np.testing.assert_array_equal(one.mask, mask)
        assert (one.codes == image.codes)[~mask].all()
        assert not (one.codes == image.codes)[mask].all()


def test_strength_keeps_codes_that_lower_strengths_keep(edit_model, images):
    """The distance from the source grows with the strength."""
    kept, distances = np.zeros((8, 8), dtype=bool), []
    for strength in (1.0, 0.8, 0.5, 0.2):
        (edited,) = edit_model.edit(images[0], TURN, strength=strength, seed=7, sampling=SAMPLING)
        now = ~sample_changes(np.ones((8, 8), dtype=bool), strength, seed=7, index=0)
        assert (now | ~kept).all()
        assert (edited.codes == images[0].codes)[now].all()
        distances.append(int((edited.codes != images[0].codes).sum()))
        kept = now
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 2 * distances[-1] > 0


def test_strength_is_a_share_of_the_mask(edit_model, images, changeable):
    """Half of the codes in the mask change at most."""
    (edited,) = edit_model.edit(images[0], TURN, mask=BOX, strength=0.5, seed=7, sampling=SAMPLING)
    changed = edited.codes != images[0].codes
    assert 0 < changed.sum() <= changeable.sum() / 2
    assert not changed[~changeable].any()


def test_distance_of_variations_grows_as_keep_falls(edit_model, images):
    """Codes that are kept at one share are kept at every larger one."""
    distances = []
    for keep in (1, 0.9, 0.6, 0.3, 0):
        varied = edit_model.vary(images[:2], keep=keep, n=3, seed=7, sampling=SAMPLING)
        distances.append(sum(int((one.codes != images[i // 3].codes).sum()) for i, one in enumerate(varied)))
        assert all((one.task, one.prompt) == ("vary", "") for one in varied)
    assert distances == sorted(distances)
    assert distances[0] == 0 < distances[1]


def test_keep_one_is_the_same_picture_without_decoding(edit_model, images, monkeypatch, save_image, tmp_path):
    """Of a file, the picture that its codes show."""
    monkeypatch.setattr(runner, "decode", None)
    save_image(tmp_path / "a.png")
    varied = edit_model.vary([images[0], tmp_path / "a.png"], keep=1, n=2, seed=7)
    for one in varied[:2]:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(images[0]))
        np.testing.assert_array_equal(one.codes, images[0].codes)
        assert one.log_probability == 0
    codes = edit_model.encode_images(tmp_path / "a.png")
    np.testing.assert_array_equal(varied[2].codes, codes)
    np.testing.assert_array_equal(np.asarray(varied[3]), edit_model.decode_images(codes))


def mixed_requests(model, images, changeable):
    """Return requests of every task and of different numbers of blanks."""
    codes = [image.codes for image in images]
    return [
        request("edit", codes[0], mask=changeable),
        GenerationRequest(prompt=FOX, seed=7, sampling=SAMPLING),
        request("fill", codes[1], mask=~changeable),
        request("vary", codes[1], strength=0.0),
        request("vary", codes[2], index=3, strength=0.4),
        GenerationRequest(task="caption", codes=codes[0], seed=7, sampling=Sampling(top_k=0)),
        request("edit", codes[2], strength=0.6, index=1),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_codes_are_the_same_in_any_batch(edit_model, images, changeable, batch_size):
    """Beside other tasks, and beside a request that samples nothing."""
    requests = mixed_requests(edit_model, images, changeable)
    together = list(edit_model.run(requests))
    apart = list(edit_model.run(requests, batch_size=batch_size))
    for one, other in zip(together, apart, strict=True):
        assert type(one) is type(other)
        if hasattr(one, "codes"):
            np.testing.assert_array_equal(one.codes, other.codes)
        else:
            assert one.text == other.text
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_codes_are_the_same_with_and_without_speculation(edit_model, images, changeable, width, monkeypatch):
    """Windows read known codes between blanks."""
    requests = [one for one in mixed_requests(edit_model, images, changeable) if one.task != "caption"]
    expected = codes_of(edit_model.run(requests))
    monkeypatch.setattr(edit_model, "speculative", width)
    assert codes_of(edit_model.run(requests)) == expected
    assert codes_of(edit_model.run(requests, batch_size=1)) == expected


def test_codes_are_the_same_when_whole_batches_are_run_again(edit_model, images):
    """A list of images, each of them alone, and one with more results."""
    settings = {"mask": BOX, "seed": 7, "sampling": SAMPLING}
    expected = codes_of(edit_model.edit(images, TURN, n=2, **settings))
    alone = [codes_of(edit_model.edit(image, TURN, n=3, **settings))[:2] for image in images]
    assert [codes for group in alone for codes in group] == expected


def test_guided_edit_of_scale_one_is_the_plain_edit(edit_model, images):
    """Text guidance needs the sequence without text, which ends in the same blanks."""
    settings = {"mask": BOX, "strength": 0.7, "seed": 7}
    plain = codes_of(edit_model.edit(images, TURN, **settings))
    assert codes_of(edit_model.edit(images, TURN, guidance=1, **settings)) == plain
    assert codes_of(edit_model.edit(images, TURN, guidance=1 + 1e-9, **settings)) == plain
    assert codes_of(edit_model.fill(images, TURN, mask=BOX, seed=7, guidance=1 + 1e-9)) == codes_of(
        edit_model.fill(images, TURN, mask=BOX, seed=7)
    )


@pytest.mark.parametrize("scales", [{"guidance": 3}, {"guidance": 3, "image_guidance": 1.5}, {"image_guidance": 2}])
def test_guided_edits_keep_codes_and_are_the_same_in_any_batch(edit_model, images, changeable, scales, monkeypatch):
    """Also with speculation; each row of the chain has the same blanks."""
    settings = {"mask": BOX, "seed": 7, "temperature": 1.1, **scales}
    edited = edit_model.edit(images, TURN, **settings)
    for one, image in zip(edited, images, strict=True):
        assert (one.codes == image.codes)[~changeable].all()
        assert one.codes.tolist() in codes_of(edit_model.edit(image, TURN, **settings))
    assert codes_of(edited) != codes_of(edit_model.edit(images, TURN, mask=BOX, seed=7, temperature=1.1))
    expected = codes_of(edited)
    monkeypatch.setattr(edit_model, "speculative", 8)
    assert codes_of(edit_model.edit(images, TURN, batch_size=2, **settings)) == expected


def test_image_guidance_belongs_to_edits(edit_model, images):
    """A filled image has no rows without its source."""
    message = "the task 'fill' has no source that could guide it: image_guidance must be 1, got 2"
    assert input_error(edit_model.fill, images, mask=BOX, image_guidance=2) == message


def test_source_of_another_size_is_fitted_with_its_mask(edit_model, save_image, tmp_path, caplog):
    """The mask has the size of the file, and the note is that of other images."""
    image = save_image(tmp_path / "wide.png", size=(192, 128))
    mask = np.zeros((128, 192), dtype=bool)
    mask[64:, :] = True
    with caplog.at_level("INFO"):
        filled = edit_model.fill([tmp_path / "wide.png", np.asarray(image)], FOX, mask=mask, seed=7)
    assert "resized from 192 x 128 and cropped to 64 x 64" in caplog.text
    known = edit_model.encode_images(image)
    for one in filled:
        np.testing.assert_array_equal(one.codes[:4], known[:4])
        assert one.mask.sum(axis=1).tolist() == [0, 0, 0, 0, 8, 8, 8, 8]
    np.testing.assert_array_equal(filled[0].codes, filled[1].codes)


def test_source_of_any_mode_is_read(edit_model, save_image, tmp_path):
    """Grey, palettes and transparency, as for the other commands."""
    image = save_image(tmp_path / "a.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    paths = [tmp_path / name for name in ("grey.png", "palette.png", "rgba.png")]
    for one, path in zip(edit_model.edit(paths, TURN, mask=BOX, seed=7), paths, strict=True):
        assert (one.codes == edit_model.encode_images(path))[0].all()


def test_metadata_name_what_was_changed(edit_model, images, changeable):
    """With the codes of the mask, the picture can be made again."""
    (edited,) = edit_model.edit(images[0], TURN, mask=BOX, strength=0.25, seed=7)
    texts = edit_model.file_metadata(edited)
    assert (texts["task"], texts["prompt"], texts["strength"]) == ("edit", TURN, "0.25")
    lines = [list(map(int, line)) for line in texts["mask_codes"].split()]
    np.testing.assert_array_equal(np.array(lines, dtype=bool), changeable)
    (varied,) = edit_model.vary(images[0], keep=0.1, n=1, seed=7)
    texts = edit_model.file_metadata(varied)
    assert (texts["task"], texts["prompt"], texts["keep"], texts["guidance"]) == ("vary", "", "0.1", "1.0")
    assert texts.keys().isdisjoint({"strength", "mask_codes"})
    assert "task" not in edit_model.file_metadata(images[0])


def test_callback_counts_the_sampled_codes(edit_model, images, changeable):
    """Every sampled code once, and no known one, in batches of different masks."""
    seen = []
    requests = [
        one for one in mixed_requests(edit_model, images, changeable) if one.task not in ("caption", "generate")
    ]
    results = list(edit_model.run(requests, callback=lambda progress: seen.append(progress)))
    blanks = [changeable.sum(), (~changeable).sum(), 0, round(0.4 * 64), round(0.6 * 64)]
    assert sum(progress.num_new for progress in seen) == sum(blanks)
    for codes, one in zip(
        seen[-1].codes(), [result for result, n in zip(results, blanks, strict=True) if n], strict=True
    ):
        np.testing.assert_array_equal(codes.filled(-1), one.codes)
    first = seen[0].codes()[0]
    np.testing.assert_array_equal(first[~changeable], images[0].codes[~changeable])


def test_callback_stops_an_edit(edit_model, images):
    """As it stops other work: what is finished is returned."""
    assert edit_model.edit(images, TURN, seed=7, callback=lambda progress: False) == []


def test_image_is_copied(edit_model, images):
    """A variation that changes nothing has codes of its own."""
    codes = images[0].codes.copy()
    (one,) = edit_model.run([request("vary", codes, strength=0)])
    codes[0, 0] += 1
    np.testing.assert_array_equal(one.codes, images[0].codes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0}, "strength must be in (0, 1], got 0"),
        ({"strength": 1.5}, "strength must be in (0, 1], got 1.5"),
        ({"strength": float("nan")}, "strength must be in (0, 1], got nan"),
        ({"strength": "half"}, "strength must be a number, got the text 'half'"),
        ({"mask": [BOX, BOX]}, "3 images need one mask or 3, got 2"),
        ({"mask": [BOX, BOX, (0, 0, 1, 65)]}, "mask: the box 0,0,1,65 reaches beyond the 64 x 64 pixels of images[2]"),
        ({"mask": [BOX, BOX, 5]}, "mask[2] must be an image, a bool array (H, W) or (G, G), or a box x,y,w,h in "),
        ({"mask": Image.new("L", (32, 32), 255)}, "mask: it is 32 x 32 pixels, and images[0] is 64 x 64; expected the"),
        ({"n": 0}, "the number of images must be from 1 to 100000, got 0"),
        ({"seed": [1, 2]}, "3 images need one seed or 3, got 2"),
    ],
)
def test_edit_refuses_bad_input(edit_model, images, settings, message):
    """In one line, before anything is decoded."""
    assert input_error(edit_model.edit, images, TURN, **settings).startswith(message)


def test_edit_needs_an_instruction(edit_model, images):
    """The message has an example of one."""
    assert (
        input_error(edit_model.edit, images, " ")
        == "the instruction is empty; say what to change, for example 把苹果变成绿色"
    )
    assert input_error(edit_model.edit, images, [TURN, SWAP]) == "3 images need one instruction or 3, got 2"


def test_full_mask_of_fill_is_refused(edit_model, images):
    """The message names the command for it; an edit may change everything."""
    message = "mask: it covers the whole image, so nothing would be kept; cogview generate makes new images"
    assert input_error(edit_model.fill, images, mask="0,0,64,64") == message
    settings = {"seed": 7, "sampling": SAMPLING}
    everywhere = edit_model.edit(images, TURN, mask="0,0,64,64", **settings)
    assert codes_of(everywhere) == codes_of(edit_model.edit(images, TURN, **settings))


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_vary_refuses_shares_out_of_range(edit_model, images, keep):
    """From 0 to 1."""
    assert input_error(edit_model.vary, images, keep=keep) == f"keep must be in [0, 1], got {keep:g}"


def test_vary_has_no_text_to_guide_it(edit_model, images):
    """Guidance in the settings of a model is ignored, that of a call is refused."""
    message = "the task 'vary' has no text that could guide it: guidance must be 1, got 3"
    assert input_error(edit_model.vary, images, guidance=3) == message
    assert edit_model.sampling(task="vary").guidance == 1


def test_weights_without_the_task_are_refused(tiny_model, images):
    """The line names the tasks of the weights."""
    tasks = "its tasks are: generate, caption, upscale, low_level"
    name = tiny_model.name
    assert input_error(tiny_model.edit, images, TURN) == f"{name} was not trained for the task 'edit'; {tasks}"
    assert input_error(tiny_model.fill, images, mask=BOX) == f"{name} was not trained for the task 'fill'; {tasks}"
    assert input_error(tiny_model.vary, images) == (
        f"{name} was not trained for the task 'fill', which 'vary' needs; {tasks}"
    )


def test_requests_with_masks_are_checked(edit_model, images, changeable):
    """A mask of another task, shape or type, and an edit without codes."""
    codes = images[0].codes

    def problem(*facts, **settings):
        return input_error(edit_model.run, [request(*facts, **settings)])

    mask = {"mask": changeable}
    assert problem("generate", None, **mask).startswith("requests[0]: mask and strength mean nothing for the task")
    assert problem("caption", codes, strength=0.5).endswith("'caption'; they belong to: edit, fill, vary")
    assert problem("edit", codes, mask=changeable[:4]) == (
        "requests[0].mask must be a bool array (8, 8) of codes, got a bool array (4, 8)"
    )
    assert problem("edit", codes, mask=changeable.astype(int)).endswith("of codes, got an int64 array (8, 8)")
    with pytest.raises(ValueError, match="a request of the task 'edit' needs the 8 x 8 codes of an image"):
        list(edit_model.run([request("edit", None)]))
    assert input_error(request, "edit", codes, strength=2) == "strength must be in [0, 1], got 2"
