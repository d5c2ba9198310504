"""The vocabulary: the released numbers, and that every id has one place and one name."""

import pytest

from cogview.tokenizers.vocabulary import COMMANDS, GRID_COMMANDS, TokenKind, Vocabulary


def test_vocabulary_equals_cogview_v1():
    vocabulary = Vocabulary()
    assert len(COMMANDS) == 27
    assert (vocabulary.size, vocabulary.padded_size) == (58219, 58240)
    assert (vocabulary.image, vocabulary.text) == (range(8192), range(8192, 58192))
    assert vocabulary.pad == vocabulary.command("[PAD]") == 58192
    assert vocabulary.command("[POS0]") == 58210
    assert vocabulary.command("[POS8]") == 58218


@pytest.mark.parametrize(("codes", "pieces"), [(8192, 50000), (8192, 800), (512, 357), (1, 1), (64, 37)])
def test_vocabulary_gives_every_id_one_range_and_one_name(codes, pieces):
    vocabulary = Vocabulary(num_image_codes=codes, num_text_pieces=pieces)
    assert [*vocabulary.image, *vocabulary.text, *vocabulary.commands] == list(range(vocabulary.size))
    assert vocabulary.padded_size % 128 == 0
    assert 0 <= vocabulary.padded_size - vocabulary.size < 128
    names = [vocabulary.name(i) for i in range(vocabulary.padded_size)]
    assert len(set(names)) == vocabulary.padded_size
    assert [vocabulary.name(vocabulary.command(name)) for name in COMMANDS] == list(COMMANDS)
    assert names[0] == "code 0"
    assert names[codes] == "piece 0"


def test_padded_size_equals_size_when_multiple_of_128():
    vocabulary = Vocabulary(num_image_codes=64, num_text_pieces=128 - 64 - len(COMMANDS))
    assert vocabulary.size == vocabulary.padded_size == 128


def test_permitted_ids_depend_on_kind():
    vocabulary = Vocabulary(num_image_codes=64, num_text_pieces=300)
    assert vocabulary.permitted(TokenKind.IMAGE) == vocabulary.image
    assert vocabulary.permitted(TokenKind.TEXT) == vocabulary.text
    assert vocabulary.permitted(TokenKind.COMMAND) == vocabulary.commands


def test_grid_command_exists_for_every_grid():
    assert GRID_COMMANDS == {8: "[TINY]", 16: "[SMALL]", 32: "[BASE]", 64: "[BIG]"}
    assert set(GRID_COMMANDS.values()) <= set(COMMANDS)


def test_vocabulary_refuses_sizes_and_names():
    vocabulary = Vocabulary()
    with pytest.raises(ValueError, match=r"command '\[BOI4\]' is unknown; known: \[PAD\] \[BOI1\] .* \[POS8\]$"):
        vocabulary.command("[BOI4]")
    with pytest.raises(ValueError, match="id 58240 is outside the vocabulary, which ends at 58239"):
        vocabulary.name(58240)
    with pytest.raises(ValueError, match="id -1 is outside"):
        vocabulary.name(-1)
    with pytest.raises(ValueError, match="one text piece, and at most 8388608 of each, got 8192 and 0"):
        Vocabulary(num_text_pieces=0)
