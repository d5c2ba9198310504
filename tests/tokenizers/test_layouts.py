"""Layouts: the sequences of CogView v1, and what every sequence promises.

Golden ids: sequences that the released CogView v1 code built with its own ``cog-pretrain.model`` (the ``t2i_tokens``,
``sr_tokens``, ``score_tokens`` and ``caption_tokens`` of its golden values); all 1034, 1294, 4 x 1030 and 1048 ids were
compared when this was written. Here stand the ids of texts and commands; the codes between them are arbitrary.
"""

import numpy as np
import pytest

from cogview.tokenizers.layouts import TokenSequence, layouts
from cogview.tokenizers.vocabulary import GRID_COMMANDS, TokenKind, Vocabulary

RELEASED = Vocabulary()
CAT_ON_SILL = [15955, 32637, 44506, 3500, 44893, 9388]  # 一只可爱的小猫坐在窗台上, in released pieces
A_CAT = [15955, 44506]  # 一只猫
SMALL = Vocabulary(num_image_codes=64, num_text_pieces=300)
RED_APPLE = [7, 21, 4]  # any pieces


def codes(side: int, num_codes: int = 8192) -> np.ndarray:
    return np.arange(side * side) * 37 % num_codes


def tiny(name: str, **values) -> TokenSequence:
    return layouts(8)[name].arrange(SMALL, **values)


def words(row: TokenSequence) -> list[str]:
    """The row as a reader sees it, an image shortened to its number of codes."""
    spelt, previous = [], None
    for token, kind, blank in zip(row.ids, row.kinds, row.blanks, strict=True):
        if kind == TokenKind.IMAGE:
            count = spelt.pop()[1] + 1 if previous == (kind, blank) else 1
            spelt.append(("?" if blank else "c", count))
        else:
            spelt.append("?" if blank else SMALL.name(int(token)))
        previous = (kind, blank)
    return [f"{word[0]}x{word[1]}" if isinstance(word, tuple) else word for word in spelt]


# --- the released sequences ---------------------------------------------------------------------------------------


def test_generate_layout_equals_cogview_v1():
    row = layouts(32)["generate"].arrange(RELEASED, text=CAT_ON_SILL, image=codes(32))
    head = [58199, 24147, 40829, 52698, 11692, 53085, 17580, 58208, 58193]
    assert row.ids.tolist() == [*head, *codes(32), 58196]
    assert row.positions.tolist() == list(range(1034))


def test_upscale_layout_equals_cogview_v1():
    row = layouts(32)["upscale"].arrange(RELEASED, text=CAT_ON_SILL, small=codes(16), image=codes(32))
    head = [58199, 24147, 40829, 52698, 11692, 53085, 17580, 58208, 58193]
    middle = [58196, 58200, 58210, 58208, 58194]
    assert row.ids.tolist() == [*head, *codes(16), *middle, *codes(32), 58197]
    roi2 = 266  # the released sequence has [ROI2] there, and its training code counts from 0 again
    assert row.ids[roi2] == RELEASED.command("[ROI2]")
    assert row.positions.tolist() == [*range(roi2), *range(1295 - roi2)]


def test_score_layout_equals_cogview_v1():
    row = layouts(32)["score"].arrange(RELEASED, image=codes(32), text=A_CAT)
    assert row.ids.tolist() == [58208, 58193, *codes(32), 58196, 58199, 24147, 52698]
    assert np.flatnonzero(row.loss).tolist() == [1028, 1029]


def test_caption_layout_equals_cogview_v1():
    """20 ids, without a stop."""
    row = layouts(32, caption_stop=False)["caption"].arrange(RELEASED, image=codes(32), max_text=20)
    assert row.ids[:1028].tolist() == [58208, 58193, *codes(32), 58196, 58199]
    assert len(row) == 1048
    assert np.flatnonzero(row.blanks).tolist() == list(range(1028, 1048))
    assert row.stop is None


def test_longest_text_equals_cogview_v1():
    """61 pieces in 1089 positions."""
    for name in ("generate", "score"):
        layout = layouts(32)[name]
        assert layout.longest_text(1089) == 61
        assert layout.length(61) == layout.max_position(61) == 1089


# --- what every row promises --------------------------------------------------------------------------------------


def test_layouts_read_as_written_for_small_grid():
    image = codes(8, 64)
    text = ["piece 7", "piece 21", "piece 4"]
    assert words(tiny("generate", text=RED_APPLE)) == ["[ROI1]", *text, "[TINY]", "[BOI1]", "?x64", "[EOI1]"]
    assert words(tiny("caption", image=image, max_text=2)) == [
        *("[TINY]", "[BOI1]", "cx64", "[EOI1]", "[ROI1]", "?", "?", "[SEP]")
    ]
    assert words(tiny("score", image=image, text=RED_APPLE)) == ["[TINY]", "[BOI1]", "cx64", "[EOI1]", "[ROI1]", *text]
    for task in ("upscale", "low_level"):
        assert words(tiny(task, text=RED_APPLE, small=image[:16])) == [
            *("[ROI1]", *text, "[TINY]", "[BOI1]", "cx16", "[EOI1]"),
            *("[ROI2]", "[POS0]", "[TINY]", "[BOI2]", "?x64", "[EOI2]"),
        ]


def test_edit_layout_restarts_positions_behind_source():
    """The code of the result and that of the source in one place have positions a fixed number apart."""
    image = codes(8, 64)
    row = tiny("edit", text=RED_APPLE, source=image)
    head = ["[ROI1]", "piece 7", "piece 21", "piece 4", "[TINY]", "[BOI1]", "cx64", "[EOI1]"]
    assert words(row) == [*head, "[ROI2]", "[TINY]", "[BOI2]", "?x64", "[EOI2]"]
    assert row.positions.tolist() == [*range(71), *range(68)]
    assert layouts(8)["edit"].max_position(3) == 71
    learnt = tiny("edit", text=RED_APPLE, source=image, image=image[::-1])
    assert np.flatnonzero(learnt.loss).tolist() == list(range(74, 138))


@pytest.mark.parametrize("name", ["edit", "fill"])
def test_unknown_codes_of_source_are_masks_and_no_blanks(name):
    """Whether None or masked; the blank image does not depend on them."""
    mask, image = SMALL.command("[MASK]"), codes(8, 64)
    unknown = np.arange(64) % 3 == 0
    row = tiny(name, text=RED_APPLE, source=np.ma.masked_array(image, mask=unknown))
    assert row.ids[row.spans["source"]].tolist() == np.where(unknown, mask, image).tolist()
    assert np.flatnonzero(row.blanks).tolist() == list(range(74, 138))
    listed = [None if absent else int(code) for code, absent in zip(image, unknown, strict=True)]
    assert tiny(name, text=RED_APPLE, source=listed).ids.tolist() == row.ids.tolist()
    without = tiny(name, text=[], source=np.ma.masked_all(64, dtype=np.int64))
    assert (without.ids[without.spans["source"]] == mask).all()


def test_fill_learns_unknown_codes_only():
    """Known ones are given in the result; an edit without its source learns the whole result."""
    image, unknown = codes(8, 64), np.arange(64) % 5 < 2
    source = np.ma.masked_array(image, mask=unknown)
    row = tiny("fill", text=RED_APPLE, source=source, image=image)
    assert (row.loss[row.spans["image"]] == unknown).all()
    assert row.loss.sum() == unknown.sum()
    assert not tiny("fill", text=RED_APPLE, source=image, image=image).loss.any()
    assert tiny("edit", text=RED_APPLE, source=source, image=image).loss.sum() == 64
    asked = tiny("fill", text=RED_APPLE, source=source, image=source)
    assert (asked.blanks[asked.spans["image"]] == unknown).all()
    assert asked.ids[asked.spans["image"]][~unknown].tolist() == image[~unknown].tolist()


@pytest.mark.parametrize("grid", sorted(GRID_COMMANDS))
@pytest.mark.parametrize("name", ["generate", "caption", "score", "upscale"])
def test_arrange_is_consistent(grid, name):
    """Length, positions, kinds, spans and ids of a complete sequence agree."""
    layout = layouts(grid)[name]
    values = {"text": RED_APPLE, "image": codes(grid, 64), "small": codes(grid // 2, 64)}
    known = layout.arrange(SMALL, **{n: v for n, v in values.items() if n != "small" or name == "upscale"})
    assert len(known) == layout.length(3)
    assert known.positions.max() + 1 == layout.max_position(3)
    assert layout.max_position(layout.longest_text(5000)) == 5000
    assert not known.blanks.any()
    assert not known.loss[0]  # nothing comes before it
    for token, kind, loss in zip(known.ids, known.kinds, known.loss, strict=True):
        assert token in SMALL.permitted(TokenKind(kind)) or (token == known.stop and kind == TokenKind.TEXT)
        assert not (loss and kind == TokenKind.COMMAND)
    offsets = {"text": SMALL.text.start, "image": 0, "small": 0}
    for element, span in known.spans.items():
        assert (known.ids[span] - offsets[element]).tolist() == list(values[element])
    assert SMALL.command(GRID_COMMANDS[grid]) in known.ids


def test_loss_counts_written_texts_and_generated_images():
    image = codes(8, 64)
    learnt = {
        "generate": tiny("generate", text=RED_APPLE, image=image),
        "caption": tiny("caption", text=RED_APPLE, image=image),
        "score": tiny("score", text=RED_APPLE, image=image),
        "upscale": tiny("upscale", text=RED_APPLE, small=image[:16], image=image),
    }
    counts = {
        name: [
            int(((row.kinds == kind) & row.loss).sum()) for kind in (TokenKind.TEXT, TokenKind.IMAGE, TokenKind.COMMAND)
        ]
        for name, row in learnt.items()
    }
    assert counts == {"generate": [3, 64, 0], "caption": [4, 0, 0], "score": [3, 0, 0], "upscale": [0, 64, 0]}
    assert learnt["upscale"].loss[learnt["upscale"].spans["image"]].all()


def test_stop_ends_caption():
    """It is learnt as a piece of the text."""
    row = tiny("caption", image=codes(8, 64), text=RED_APPLE)
    assert row.stop == row.ids[-1] == SMALL.command("[SEP]")
    assert row.loss[-1]
    assert row.kinds[-1] == TokenKind.TEXT
    without = layouts(8, caption_stop=False)["caption"].arrange(SMALL, image=codes(8, 64), text=RED_APPLE)
    assert without.ids.tolist() == row.ids[:-1].tolist()
    assert tiny("generate", text=RED_APPLE).stop is None


def test_arrange_takes_empty_text():
    assert words(tiny("generate", text=[])) == ["[ROI1]", "[TINY]", "[BOI1]", "?x64", "[EOI1]"]


def test_blanks_hold_pad():
    row = tiny("generate", text=RED_APPLE)
    assert np.flatnonzero(row.blanks).tolist() == list(range(6, 70))
    assert (row.ids == SMALL.pad).tolist() == row.blanks.tolist()
    assert (row.kinds[row.blanks] == TokenKind.IMAGE).all()


@pytest.mark.parametrize("as_given", ["nones", "masked", "masked lines"])
def test_arrange_takes_scattered_codes(as_given):
    """As in the windows of upscaling; a shorter value leaves the rest blank."""
    known = np.array([True, False, False, True] * 8)
    image = codes(8, 64)[:32]
    given = {
        "nones": [c if k else None for c, k in zip(image, known, strict=True)],
        "masked": np.ma.masked_array(image, mask=~known),
        "masked lines": np.ma.masked_array(image, mask=~known).reshape(4, 8),
    }[as_given]
    row = tiny("generate", text=RED_APPLE, image=given)
    span = row.spans["image"]
    assert row.blanks[span].tolist() == [*~known, *[True] * 32]
    assert row.ids[span][:32].tolist() == np.where(known, image, SMALL.pad).tolist()


def test_arrange_takes_first_codes():
    row = tiny("generate", text=RED_APPLE, image=[5, 6, 7])
    assert words(row)[-3:] == ["cx3", "?x61", "[EOI1]"]


def test_arrange_takes_first_pieces_of_blank_text():
    row = tiny("caption", image=codes(8, 64), text=[7, 21], max_text=4)
    assert words(row)[-5:] == ["piece 7", "piece 21", "?", "?", "[SEP]"]


def test_arrange_takes_any_integer_type_and_shape():
    """And leaves the values as they are."""
    expected = tiny("generate", text=RED_APPLE, image=list(range(64))).ids.tolist()
    for image in (np.arange(64, dtype=np.uint16), np.arange(64).reshape(8, 8), np.arange(64).astype(object)):
        before = image.copy()
        assert tiny("generate", text=np.array(RED_APPLE), image=image).ids.tolist() == expected
        assert (image == before).all()


def test_longest_text_counts_section_of_text_only():
    """Positions restart behind the small image."""
    layout = layouts(32)["upscale"]
    assert layout.length(55) == 1344  # places
    assert layout.max_position(55) == 1029  # positions: [ROI2] and what follows it, whatever the text
    assert layout.max_position(829) == 1089
    assert layout.longest_text(1089) == 829


@pytest.mark.parametrize("name", ["generate", "upscale"])
def test_text_positions_fix_position_of_codes(name):
    """Whatever the length of the text."""
    layout = layouts(8, text_positions=20)[name]
    values = {"small": [0] * 16} if name == "upscale" else {}
    rows = [layout.arrange(SMALL, text=text, **values) for text in ([], RED_APPLE, [5] * 20)]
    for span in rows[0].spans.keys() - {"text"}:
        starts = [row.positions[row.spans[span]] for row in rows]
        assert (starts[0] == starts[1]).all()
        assert (starts[0] == starts[2]).all()
    assert rows[1].positions[: 1 + len(RED_APPLE)].tolist() == [0, 1, 2, 3]  # the text itself goes on as ever
    full, plain = rows[2], layouts(8)[name].arrange(SMALL, text=[5] * 20, **values)
    assert (full.positions == plain.positions).all()
    assert [len(row) for row in rows] == [layout.length(0), layout.length(3), layout.length(20)]
    assert layout.max_position(3) == max(row.positions.max() for row in rows) + 1
    assert layout.longest_text(layout.max_position(0)) == 20
    with pytest.raises(ValueError, match=f"layout '{name}': 'text' has 21 pieces, there is space for 20"):
        layout.arrange(SMALL, text=[5] * 21, **values)


def test_text_positions_leave_captions_unchanged():
    spaced = layouts(8, text_positions=20)["caption"].arrange(SMALL, image=codes(8, 64), max_text=9)
    assert (spaced.positions == tiny("caption", image=codes(8, 64), max_text=9).positions).all()


def test_truncate_keeps_first_tokens():
    row = tiny("upscale", text=RED_APPLE, small=codes(4, 64))
    start = row.spans["image"].start
    window = row.truncate(start + 5 * 8)
    assert len(window) == start + 40
    assert window.spans["image"] == slice(start, start + 40)
    assert window.spans["small"] == row.spans["small"]
    assert words(window)[-1] == "?x40"
    for name in ("ids", "positions", "kinds", "blanks", "loss"):
        assert getattr(window, name).tolist() == getattr(row, name)[: start + 40].tolist()


IMAGE = list(range(64))
UNDIVIDED = {"generate", "caption", "score", "edit", "fill"}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("score", {"image": IMAGE}, "'score': 'text' is missing: expected pieces$"),
        ("caption", {"max_text": 4}, "'caption': 'image' is missing: expected 64 codes$"),
        ("caption", {"image": IMAGE}, "'caption': 'text' is missing: expected pieces or max_text$"),
        ("score", {"image": IMAGE[:9], "text": [1]}, "'image' must be known in full: got 9 codes, expected 64"),
        (
            "score",
            {"image": [None, *IMAGE[1:]], "text": [1]},
            "'image' must be known in full: got 63 codes, expected 64",
        ),
        ("generate", {"text": [3, None]}, "'text' must be known in full: got 1 pieces, expected 2"),
        ("generate", {"text": [3], "image": [*IMAGE, 1]}, "'generate': 'image' has 65 codes, there is space for 64"),
        ("caption", {"image": IMAGE, "text": [1, 2, 3], "max_text": 2}, "'text' has 3 pieces, there is space for 2"),
        ("generate", {"text": [3], "image": [5, None, 64]}, "'image' holds 64 at 2, expected codes from 0 to 63"),
        ("generate", {"text": [3], "image": [-1]}, "'image' holds -1 at 0, expected codes from 0 to 63"),
        ("generate", {"text": [1, 300]}, "'text' holds 300 at 1, expected pieces from 0 to 299"),
        ("generate", {"text": [1.5]}, "'text' must hold whole numbers, got 1.5"),
        ("generate", {"text": ["红"]}, "'text' must hold whole numbers, got 红"),
        ("generate", {"text": [3], "image": [[1, 2], [3]]}, "'image' must be a flat list or a rectangle of numbers"),
        ("edit", {"text": [3]}, "'source' is missing: expected 64 codes$"),
        ("fill", {"text": [3], "source": IMAGE[:9]}, "'source' must be known in full: got 9 codes, expected 64"),
        (
            "fill",
            {"text": [3], "source": [None, 64, *IMAGE[2:]]},
            "'source' holds 64 at 1, expected codes from 0 to 63",
        ),
        ("generate", {"text": [3], "picture": IMAGE}, "'generate' has no element 'picture'; it has text, image"),
        ("generate", {"text": [3], "max_text": 4}, "'generate' has no blank text for max_text=4 to bound"),
    ],
)
def test_arrange_refuses_values(name, values, message):
    """The message names the layout and the element."""
    with pytest.raises(ValueError, match=message) as caught:
        tiny(name, **values)
    assert f"layout '{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        (1, UNDIVIDED),
        (5, UNDIVIDED),
        (10, UNDIVIDED | {"low_level"}),
        (12, UNDIVIDED | {"low_level", "upscale"}),
        (256, UNDIVIDED | {"low_level", "upscale"}),
    ],
)
def test_layouts_of_any_grid_are_those_of_tasks_that_divide_it(grid, names):
    assert set(layouts(grid)) == names


def test_layouts_of_a_grid_without_a_command_have_that_of_the_next_larger():
    for grid, command in ((1, "[TINY]"), (7, "[TINY]"), (12, "[SMALL]"), (20, "[BASE]"), (33, "[BIG]"), (200, "[BIG]")):
        assert layouts(grid)["generate"].elements[2] == command
    row = layouts(12)["upscale"].arrange(SMALL, text=RED_APPLE, small=codes(6, 64), image=codes(12, 64))
    assert (row.spans["small"], row.spans["image"]) == (slice(6, 42), slice(47, 191))
    assert row.positions.max() == 4 + 144


def test_layouts_refuse_grids_and_texts_out_of_range():
    for grid in (0, 257):
        with pytest.raises(ValueError, match=f"must be from 1 to 256 codes on a side, got {grid}"):
            layouts(grid)
    with pytest.raises(ValueError, match="'generate' needs 68 positions without any text, there are 67"):
        layouts(8)["generate"].longest_text(67)
