"""Train the text tokenizer on captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cogview.errors import InputError
from cogview.files import atomic_write
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
from cogview.vqvae.ranges import COUNT, check_ranges


@dataclass(frozen=True, kw_only=True)
class TextTokenizerRecipe:
    """The ``text`` section of a recipe.

    Args:
        captions: Captions to train on.
        size: Maximum number of pieces.
        coverage: Fraction of the character occurrences that get pieces; the other characters are spelt in bytes.
        max_piece_length: Maximum length of a piece, in characters.
        whole_names: Make one piece of each name of the dataset, of any length.

    Raises:
        ValueError: A number is out of range.
    """

    captions: int = 50_000
    size: int = 2000
    coverage: float = 1.0
    max_piece_length: int = 1
    whole_names: bool = False

    def __post_init__(self) -> None:
        check_ranges(
            self, {"captions": COUNT, "size": "[1, 1048576]", "coverage": "(0, 1]", "max_piece_length": "[1, 512]"}
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
