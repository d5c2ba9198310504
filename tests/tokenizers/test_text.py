"""The text tokenizer: nothing is lost, spellings agree, training is repeatable and says what doesn't suit it."""

import io
import pickle
import unicodedata

import pytest
import sentencepiece

from cogview.tokenizers.text import TextTokenizer, chinese_punctuation, train_text_tokenizer

COLOURS = ["红色", "蓝色", "绿色", "黄色", "白色", "黑色", "紫色", "橙色"]
THINGS = ["苹果", "狐狸", "猫", "狗", "房子", "汽车", "飞机", "香蕉", "熊猫", "老虎", "狮子", "大象"]
CAPTIONS = [f"{colour}背景上的{number}只{thing}" for colour in COLOURS for number in "一两三四" for thing in THINGS] + [
    f"{left}在{right}的左边" for left in THINGS for right in THINGS
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(train_text_tokenizer(CAPTIONS, size=340))


@pytest.mark.parametrize(
    "text",
    [
        "蓝色背景上的三只狐狸",  # a caption of the corpus
        "大象在红色的飞机上",  # its words in a new order
        "龘靐齉爩",  # characters it never saw
        "一只 cute cat，sits!",
        "🦊👩‍👩‍👧 和 🍎",  # joiners are kept
        "㍿ﾊﾝｶｸ ① é",  # changed by NFKC
        "<unk><0x41>[BOI1]",  # the look of a special piece gives no special piece
        "两行\n和\t制表",
        "零\0字节",
        "",
    ],
)
def test_decode_inverts_encode(tokenizer, text):
    """Up to NFKC normalization."""
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("四头大象,背景是青色的", "四头大象，背景是青色的"),
        ("左边:狐狸;右边:狗!好吗?", "左边：狐狸；右边：狗！好吗？"),
        ("1,000只猫", "1,000只猫"),
        ("a fox, a dog", "a fox, a dog"),
        ("“狐狸”,狗", "“狐狸”，狗"),
        ("", ""),
    ],
)
def test_chinese_punctuation_keeps_the_pieces_of_a_text(tokenizer, text, expected):
    assert chinese_punctuation(text) == expected
    assert tokenizer.encode(expected) == tokenizer.encode(text)


def test_training_captions_are_shorter_than_their_characters(tokenizer):
    """And need no byte pieces."""
    ids = [tokenizer.encode(caption) for caption in CAPTIONS]
    assert [tokenizer.decode(i) for i in ids] == CAPTIONS
    assert sum(map(len, ids)) < 0.7 * sum(map(len, CAPTIONS))
    assert max(map(tokenizer.byte_share, CAPTIONS)) == 0


def test_encode_normalizes_width_of_characters(tokenizer):
    assert tokenizer.encode("Ａ１，红苹果！") == tokenizer.encode("A1,红苹果!")
    assert tokenizer.encode("红　苹果") == tokenizer.encode("红 苹果")


def test_encode_drops_superfluous_spaces(tokenizer):
    assert tokenizer.encode("  红  苹果　") == tokenizer.encode("红 苹果")


def test_max_piece_length_bounds_pieces():
    def longest(max_piece_length):
        model = train_text_tokenizer(CAPTIONS, size=310, max_piece_length=max_piece_length)
        tokenizer = TextTokenizer(model)
        return max(len(tokenizer.decode([i])) for i in range(257, tokenizer.size))

    assert longest(2) == 2
    assert longest(16) > 4  # whole phrases of the grammar


def test_byte_share_counts_unknown_characters(tokenizer):
    assert tokenizer.byte_share("") == 0
    assert tokenizer.byte_share("红苹果") == 0
    assert tokenizer.byte_share("龘") == 1
    assert tokenizer.byte_share("猫龘") == 1 / 2  # of the characters, however many bytes spell one
    assert tokenizer.byte_share("猫 龘 猫 猫") == 1 / 4
    assert tokenizer.byte_share("ＡＢ龘龘") == 1  # NFKC: AB, of which this corpus has none either


def test_byte_share_knows_characters_of_longer_pieces():
    model = train_text_tokenizer(["一只狐狸", "一只猫"], size=270, max_piece_length=1, words=["狐狸"])
    tokenizer = TextTokenizer(model)
    assert tokenizer.byte_share("一只狐狸") == 0
    assert tokenizer.byte_share("狐") == 1
    assert tokenizer.byte_share("狐狸狐") == 1 / 3


def test_byte_share_counts_unk_when_model_has_no_bytes():
    """As the released model, which has no bytes, begins texts with a space mark, and has <s> and </s>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=100, minloglevel=2
    )
    tokenizer = TextTokenizer(model.getvalue())
    assert tokenizer.size == 100
    assert tokenizer.decode(tokenizer.encode("一只狐狸")) == "一只狐狸"
    assert tokenizer.byte_share("一只狐狸") == 0
    assert 0 in tokenizer.encode("一只龘")
    assert 0 < tokenizer.byte_share("一只龘") < 1


def test_training_is_reproducible_and_silent(capfd):
    first = train_text_tokenizer(iter(CAPTIONS), size=330)
    assert first == train_text_tokenizer([f" {caption}\n" for caption in CAPTIONS] + ["", "  "], size=330)
    assert TextTokenizer(first).size == 330
    assert capfd.readouterr() == ("", "")


def test_coverage_leaves_rare_characters_to_bytes():
    captions = [*CAPTIONS, "龘"]
    assert TextTokenizer(train_text_tokenizer(captions, size=320, coverage=1.0)).byte_share("龘") == 0
    assert TextTokenizer(train_text_tokenizer(captions, size=320, coverage=0.999)).byte_share("龘") == 1


def test_training_reads_long_lines():
    long = "狐狸" * 3000  # 18 kB; SentencePiece by itself would skip it
    assert TextTokenizer(train_text_tokenizer([*CAPTIONS, long + "鲸"], size=340, coverage=1.0)).byte_share("鲸") == 0


def test_model_bytes_equal_file(tokenizer, tmp_path):
    path = tmp_path / "text.model"
    path.write_bytes(tokenizer.model_bytes)
    loaded = TextTokenizer.load(path)
    assert loaded.model_bytes == tokenizer.model_bytes
    assert loaded.encode("蓝色背景上的三只狐狸") == tokenizer.encode("蓝色背景上的三只狐狸")


def test_tokenizer_can_be_pickled(tokenizer):
    """Workers of a data loader get a copy."""
    assert pickle.loads(pickle.dumps(tokenizer)).encode("三只狐狸") == tokenizer.encode("三只狐狸")


def test_load_refuses_missing_and_damaged_files(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text tokenizer at .*none.model: expected a SentencePiece"):
        TextTokenizer.load(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match="no text tokenizer"):
        TextTokenizer.load(tmp_path)  # a folder
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", tokenizer.model_bytes[:1000]):
        path = tmp_path / "broken.model"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"broken.model: {len(content)} bytes that are no SentencePiece model"):
            TextTokenizer.load(path)


def test_encode_and_decode_refuse_invalid_values(tokenizer):
    for wrong in (None, ["狐狸"], b"fox"):
        with pytest.raises(TypeError, match=f"text must be one str, got {type(wrong).__name__}"):
            tokenizer.encode(wrong)
    assert repr(tokenizer) == "<TextTokenizer of 340 pieces>"
    with pytest.raises(ValueError, match="piece id 340 is outside 0 to 339"):
        tokenizer.decode([1, 340])
    with pytest.raises(ValueError, match="piece id -1 is outside"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match="holds bytes that are not UTF-8"):
        tokenizer.encode(b"\xbb\xa8".decode("utf-8", "surrogateescape"))  # what Linux hands on from a GBK terminal


@pytest.mark.parametrize("lines", [[], ["", "  \n"]])
def test_training_refuses_empty_corpus(lines):
    with pytest.raises(ValueError, match="corpus for the text tokenizer is empty: expected one caption per line"):
        train_text_tokenizer(lines, size=300)


def test_training_takes_all_pieces_when_size_exceeds_corpus():
    most = TextTokenizer(train_text_tokenizer(CAPTIONS, size=5000)).size
    assert 256 < most < 5000
    assert TextTokenizer(train_text_tokenizer(CAPTIONS, size=most + 1)).size == most
    assert TextTokenizer(train_text_tokenizer(CAPTIONS, size=most - 10)).size == most - 10


def test_training_names_smallest_size_when_size_is_too_small():
    def least(size):
        with pytest.raises(ValueError, match=r"too small for this corpus: at least \d+") as caught:
            train_text_tokenizer(CAPTIONS, size=size)
        assert "\n" not in str(caught.value)
        return int(str(caught.value).rsplit(" at least ", 1)[1].split()[0])

    smallest = least(10)
    assert TextTokenizer(train_text_tokenizer(CAPTIONS, size=smallest)).size == smallest
    assert least(smallest - 1) == smallest


def test_training_refuses_settings():
    with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\], got 1.5"):
        train_text_tokenizer(CAPTIONS, size=300, coverage=1.5)
    with pytest.raises(ValueError, match="max_piece_length must be at least 1, got 0"):
        train_text_tokenizer(CAPTIONS, size=300, max_piece_length=0)
    with pytest.raises(ValueError, match="a line of the corpus has more than 1048576 bytes"):
        train_text_tokenizer(["长" * 400_000], size=300)
    with pytest.raises(ValueError, match=r"could not train a tokenizer of size -5: INTERNAL"):
        train_text_tokenizer(CAPTIONS, size=-5)


def test_text_tokenizer_refuses_a_file_that_is_too_large(tmp_path):
    """A sparse file of terabytes was read as a whole."""
    with (tmp_path / "text.model").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"text\.model has 1099511627776 bytes, a SentencePiece model has at most "):
        TextTokenizer.load(tmp_path / "text.model")
