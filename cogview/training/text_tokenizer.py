"""Train the text tokenizer on captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from cogview.data.builders.corpus import CaptionCorpus, read_corpus
from cogview.data.builders.prepare import to_simplified
from cogview.data.sources.captions import caption_records
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError
from cogview.files import atomic_write
from cogview.formatting import format_list
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
from cogview.vqvae.ranges import COUNT, check_ranges

SHOWN_CHARACTERS = 10  # of those that are spelt in bytes


@dataclass(frozen=True, kw_only=True)
class TextTokenizerRecipe:
    """The ``text`` section of a recipe.

    Args:
        pictures: Sources of captions, as ``cogview data build`` reads them, or ``.txt`` files with a caption a line;
            none for the captions of the emoji world.
        table: Folder and columns of sources that are tables.
        simplified: Convert traditional characters of the sources to simplified ones.
        held_out: Share of the captions of the sources that the tokenizer is measured on and not trained on.
        captions: Maximum number of captions to train on. Of more in the sources, random ones are taken.
        size: Maximum number of pieces.
        coverage: Fraction of the character occurrences that get pieces, at least 0.98 for SentencePiece; the other
            characters are spelt in bytes.
        max_piece_length: Maximum length of a piece, in characters.
        whole_names: Make one piece of each name of the emoji world, of any length.

    Raises:
        ValueError: A number is out of range, or a setting of sources is given without ``pictures`` or the reverse.
    """

    pictures: tuple[Path, ...] = ()
    table: TableOptions = field(default_factory=TableOptions)
    simplified: bool = False
    held_out: float = 0.05
    captions: int = 50_000
    size: int = 2000
    coverage: float = 1.0
    max_piece_length: int = 1
    whole_names: bool = False

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "held_out": "[0, 1)",
                "captions": COUNT,
                "size": "[1, 1048576]",
                "coverage": "[0.98, 1]",
                "max_piece_length": "[1, 512]",
            },
        )
        if self.pictures and self.whole_names:
            raise ValueError("whole_names needs the names of the emoji world, which pictures lack: leave it out")
        if not self.pictures and (self.simplified or self.table != TableOptions()):
            raise ValueError("simplified and table apply to pictures, which are not given")


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """How a text tokenizer spells captions that it was not trained on.

    Attributes:
        captions: Number of the captions; 0 if there are none.
        byte_share: Share of their characters that are spelt in bytes, 0 to 1.
        pieces: Mean number of pieces of a caption.
        foreign: The most frequent characters that are spelt in bytes.
    """

    captions: int
    byte_share: float = 0.0
    pieces: float = 0.0
    foreign: tuple[str, ...] = ()


def read_captions(recipe: TextTokenizerRecipe, on_note: Callable[[str], object]) -> CaptionCorpus:
    """Return the captions of the sources of a recipe.

    Args:
        recipe: Settings with ``pictures``.
        on_note: Called with a line about what was guessed.

    Raises:
        InputError: A source cannot be read, no caption of them can be used, or the package that converts characters is
            missing.
    """
    convert = to_simplified() if recipe.simplified else str
    records = chain.from_iterable(caption_records(path, recipe.table, on_note) for path in recipe.pictures)
    corpus = read_corpus(records, limit=recipe.captions, held_out=recipe.held_out, convert=convert)
    if not corpus.training.count:
        sources = format_list(recipe.pictures)
        if corpus.held_out.count:
            raise InputError(f"the held-out share took all captions of {sources}: lower it, held_out: 0 takes none")
        reason = f"; the first entry is {corpus.first_skipped}" if corpus.skipped else ""
        raise InputError(f"no caption of {sources} can be used{reason}")
    return corpus


def measure_held_out(tokenizer: TextTokenizer, captions: Sequence[str]) -> HeldOutText:
    """Measure how a text tokenizer spells captions.

    Args:
        tokenizer: The tokenizer.
        captions: Captions that it was not trained on.
    """
    if not captions:
        return HeldOutText(captions=0)
    pieces = [len(tokenizer.encode(caption)) for caption in captions]
    characters = Counter(character for caption in captions for character in caption if not character.isspace())
    # A character without a piece of its own is never part of a longer one.
    foreign = Counter({each: count for each, count in characters.items() if tokenizer.byte_share(each)})
    return HeldOutText(
        captions=len(captions),
        byte_share=foreign.total() / max(1, characters.total()),
        pieces=sum(pieces) / len(pieces),
        foreign=tuple(each for each, _ in foreign.most_common(SHOWN_CHARACTERS)),
    )


def train_text_model(
    path: Path, recipe: TextTokenizerRecipe, captions: Iterable[str], names: Sequence[str] = ()
) -> TextTokenizer:
    """Train a text tokenizer and write its file.

    Args:
        path: The ``.model`` file to write. Its folder is made if needed.
        recipe: Settings of the tokenizer.
        captions: The corpus, of which the first ``recipe.captions`` are read.
        names: Names that become one piece each with ``whole_names``.

    Returns:
        The trained tokenizer.

    Raises:
        InputError: The corpus is empty or does not suit the settings.
    """
    try:
        model = train_text_tokenizer(
            islice(captions, recipe.captions),
            size=recipe.size,
            coverage=recipe.coverage,
            max_piece_length=recipe.max_piece_length,
            words=names if recipe.whole_names else (),
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model)
    return TextTokenizer(model)
