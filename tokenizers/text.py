"""Encode text as piece ids and decode it, with SentencePiece (arXiv:1808.06226).

Tokenizers of ``train_text_tokenizer`` drop only superfluous spaces: text is NFKC-normalised, so that full-width and
half-width forms agree, and a character without a piece is encoded as its UTF-8 bytes. (U+2581, SentencePiece's mark of
a space, reads as a space.) CogView v1's ``cog-pretrain.model`` loads too; it has no byte pieces, and an unknown
character becomes ``<unk>``.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_WIDE_MARKS = str.maketrans(",:;?!", "，：；？！")
_CHINESE_MARK = re.compile(r"(?<=[\u3400-\u9fff\u3000-\u303f])[,:;?!]+|[,:;?!]+(?=[\u3400-\u9fff])")
_MAX_MODEL_BYTES = 1 << 26  # a hundred thousand pieces take 2 MB
_MAX_LINE_BYTES = 1 << 20  # SentencePiece silently skips lines over 4192 bytes by default


class TextTokenizer:
    """A SentencePiece model. Ids count its pieces from 0; the vocabulary adds the offset.

    Args:
        model_bytes: content of a SentencePiece ``.model`` file.

    Raises:
        ValueError: if the content is not a SentencePiece model.
    """

    def __init__(self, model_bytes: bytes) -> None:
        import sentencepiece

        self.model_bytes = model_bytes
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes or b"nothing")
        except RuntimeError:
            raise ValueError(
                f"{len(model_bytes)} bytes that are no SentencePiece model (a file cut short, or a Git LFS pointer?)"
            ) from None
        self.size: int = self._processor.vocab_size()
        # Pieces of characters that the model lacks: bytes, or <unk> in a model without bytes.
        self._foreign = {i for i in range(self.size) if self._processor.is_byte(i) or self._processor.is_unknown(i)}

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Load a ``.model`` file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a SentencePiece model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no text tokenizer at {path}: expected a SentencePiece .model file")
        if (size := path.stat().st_size) > _MAX_MODEL_BYTES:
            raise ValueError(f"{path} has {size} bytes, a SentencePiece model has at most {_MAX_MODEL_BYTES}")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[bytes]]:
        return type(self), (self.model_bytes,)  # loader workers get their own copy of the model

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.size} pieces>"

    def encode(self, text: str) -> list[int]:
        """Return the piece ids of a text. Leading, trailing and repeated spaces are dropped, as in training.

        Raises:
            TypeError: if it is no text.
            ValueError: if the text holds bytes that are not UTF-8.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be one str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the text {text!r} holds bytes that are not UTF-8") from None
        return list(self._processor.encode(text))

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the piece ids of a text, and the characters that each stands for.

        Args:
            text: The text, in NFKC with single spaces.

        Returns:
            The ids, and of each the index of its first character and of the one after its last. Bytes of one character
            all have that character.
        """
        ids, spans, end = self.encode(text), [], 0
        pieces = self._processor.encode(text, out_type=str)
        if "".join(pieces[:1]).startswith("\u2581") and not text.startswith(" "):
            end = -1  # v1's tokenizer puts a space before the text
        for i, piece in zip(ids, pieces, strict=True):
            is_byte = self._processor.is_byte(i)
            start = end
            if not is_byte:
                end += len(piece)
            elif int(piece[3:5], 16) & 0xC0 == 0x80:  # a further byte of a character
                start -= 1
            else:
                end += 1
            spans.append((max(0, start), end))
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of piece ids; bytes that form no character become U+FFFD.

        Raises:
            ValueError: if an id is outside [0, size).
        """
        for i in ids:
            if not 0 <= i < self.size:
                raise ValueError(f"piece id {i} is outside 0 to {self.size - 1}")
        return str(self._processor.decode([int(i) for i in ids]))

    @property
    def pieces(self) -> list[str]:
        """The pieces by id, as SentencePiece spells them: ``▁`` is a space, ``<0x41>`` a byte."""
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def byte_share(self, text: str, ids: Sequence[int] | None = None) -> float:
        """Return the fraction of characters, 0 to 1, that are encoded as bytes or become ``<unk>``.

        Args:
            text: The text.
            ids: Its piece ids, if they are known.
        """
        characters = len("".join(unicodedata.normalize("NFKC", text).split()))
        own = [
            self._processor.id_to_piece(i)
            for i in (self.encode(text) if ids is None else ids)
            if i not in self._foreign
        ]
        spelt = sum(len(piece.replace("\u2581", "")) for piece in own)
        return max(0, characters - spelt) / max(characters, 1)


def chinese_punctuation(text: str) -> str:
    """Return a text with the punctuation of Chinese beside Chinese characters, such as "，" for ",".

    Tokenizers normalize these marks by NFKC, so both forms have the same pieces.
    """
    return _CHINESE_MARK.sub(lambda match: match[0].translate(_WIDE_MARKS), text)


def train_text_tokenizer(
    lines: Iterable[str], *, size: int, coverage: float = 0.9995, max_piece_length: int = 4, words: Sequence[str] = ()
) -> bytes:
    """Train a unigram SentencePiece model; the same lines give the same bytes.

    The lines are held in memory.

    Args:
        lines: the corpus, one caption per line.
        size: maximum number of pieces: ``<unk>``, 256 bytes, the space, the characters of the corpus, then longer ones
            as far as the corpus has them.
        coverage: fraction of character occurrences, in (0, 1], that get pieces; rarer characters are encoded as bytes.
        max_piece_length: in characters. Chinese words rarely exceed four; longer pieces swallow phrases of a corpus
            with few patterns, after which a new combination of the same words looks unseen.
        words: one piece each wherever they occur, of any length; where two overlap, the longer one wins.

    Returns:
        The content of the ``.model`` file.

    Raises:
        ValueError: if the corpus has no text, or ``size``, ``coverage`` or ``max_piece_length`` do not suit it.
    """
    import sentencepiece

    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")
    if max_piece_length < 1:
        raise ValueError(f"max_piece_length must be at least 1, got {max_piece_length}")
    corpus = [line.strip() for line in lines if line.strip()]
    if not corpus:
        raise ValueError("the corpus for the text tokenizer is empty: expected one caption per line")
    if any(len(line.encode()) > _MAX_LINE_BYTES for line in corpus):
        raise ValueError(f"a line of the corpus has more than {_MAX_LINE_BYTES} bytes: split it, one caption per line")

    model = io.BytesIO()
    options: dict[str, Any] = {
        "sentence_iterator": iter(corpus),
        "model_writer": model,
        "model_type": "unigram",
        "vocab_size": size,
        "hard_vocab_limit": False,  # a small corpus may have fewer pieces
        "character_coverage": coverage,
        "max_sentencepiece_length": max_piece_length,
        "user_defined_symbols": [unicodedata.normalize("NFKC", word) for word in dict.fromkeys(words)],
        "max_sentence_length": _MAX_LINE_BYTES,
        "normalization_rule_name": "nfkc",
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "required_chars": "\u2581",  # the space; a corpus without spaces would decode it as this mark
        "unk_id": 0,  # SentencePiece insists on it; the others are commands of our vocabulary
        "bos_id": -1,
        "eos_id": -1,
        "pad_id": -1,
        "num_threads": 1,
        "shuffle_input_sentence": False,
        "minloglevel": 2,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except RuntimeError as error:
        raise ValueError(_explain(str(error), size)) from None
    return model.getvalue()


def _explain(message: str, size: int) -> str:
    """Return SentencePiece's reason for not training as one line with a remedy."""
    if too_small := re.search(r"\d+ vs (\d+)", message):
        return (
            f"a text tokenizer of size {size} is too small for this corpus: at least {too_small[1]} "
            "(256 bytes and every character), or a lower coverage"
        )
    return f"SentencePiece could not train a tokenizer of size {size}: {' '.join(message.split())}"
