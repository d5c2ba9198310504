"""The vocabulary of a model: image codes, then text pieces, then 27 commands.

Commands and order are those of CogView v1, where 8192 codes and 50,000 pieces make 58,219 ids, padded to 58,240.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

COMMANDS: Final = (
    *("[PAD]", "[BOI1]", "[BOI2]", "[BOI3]", "[EOI1]", "[EOI2]", "[EOI3]", "[ROI1]", "[ROI2]", "[ROI3]"),
    *("[SEP]", "[MASK]", "[CLS]", "[ENC]", "[TINY]", "[SMALL]", "[BASE]", "[BIG]"),
    *("[POS0]", "[POS1]", "[POS2]", "[POS3]", "[POS4]", "[POS5]", "[POS6]", "[POS7]", "[POS8]"),
)

# The command that announces an image, by the number of codes on a side, as in CogView v1 (``grid_command``).
GRID_COMMANDS: Final = {8: "[TINY]", 16: "[SMALL]", 32: "[BASE]", 64: "[BIG]"}
MAX_GRID = 256  # codes on a side of an image

MAX_IDS = 1 << 23  # image codes, or text pieces

# Rows of the embedding are padded to this multiple, as in CogView v1: matrix products are faster.
_ROW_MULTIPLE = 128


def grid_command(grid: int) -> str:
    """Return the command that announces an image.

    CogView v1 has commands for four grids. Another grid has that of the next larger one, and those above 64 have
    ``[BIG]``. All images of a model have one grid, so their command never distinguishes two grids.

    Args:
        grid: Codes on a side of the image, from 1 to ``MAX_GRID``.

    Raises:
        ValueError: The grid is outside that range.

    Examples:
        >>> grid_command(32), grid_command(12)
        ('[BASE]', '[SMALL]')
    """
    if not 1 <= grid <= MAX_GRID:
        raise ValueError(f"the grid of an image must be from 1 to {MAX_GRID} codes on a side, got {grid}")
    return GRID_COMMANDS[min((known for known in GRID_COMMANDS if known >= grid), default=max(GRID_COMMANDS))]


class TokenKind(IntEnum):
    """Kind of the token at a position of a sequence."""

    COMMAND = 0
    TEXT = 1
    IMAGE = 2


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ranges of the ids of codes, pieces and commands. The defaults are the sizes of CogView v1.

    Args:
        num_image_codes: size of the codebook, at least 1.
        num_text_pieces: size of the text tokenizer, at least 1.

    Raises:
        ValueError: if a size is outside its range.
    """

    num_image_codes: int = 8192
    num_text_pieces: int = 50000

    def __post_init__(self) -> None:
        if not (1 <= self.num_image_codes <= MAX_IDS and 1 <= self.num_text_pieces <= MAX_IDS):
            raise ValueError(
                "a vocabulary needs at least one image code and one text piece, "
                f"and at most {MAX_IDS} of each, got {self.num_image_codes} and {self.num_text_pieces}"
            )

    @property
    def image(self) -> range:
        """Ids of the image codes: code c is ``image[c]``."""
        return range(self.num_image_codes)

    @property
    def text(self) -> range:
        """Ids of the text pieces: piece p of the text tokenizer is ``text[p]``."""
        return range(self.image.stop, self.image.stop + self.num_text_pieces)

    @property
    def commands(self) -> range:
        """Ids of ``COMMANDS``, in their order."""
        return range(self.text.stop, self.text.stop + len(COMMANDS))

    @property
    def size(self) -> int:
        """Number of ids in use."""
        return self.commands.stop

    @property
    def padded_size(self) -> int:
        """Rows of the embedding: ``size`` rounded up to a multiple of 128. The ids in between are never used."""
        return -(-self.size // _ROW_MULTIPLE) * _ROW_MULTIPLE

    @property
    def pad(self) -> int:
        """Id of ``[PAD]``, which also marks positions that are not known yet."""
        return self.command("[PAD]")

    def command(self, name: str) -> int:
        """Return the id of a command such as ``"[BOI1]"``.

        Raises:
            ValueError: if there is no such command.
        """
        if name not in COMMANDS:
            raise ValueError(f"command {name!r} is unknown; known: {' '.join(COMMANDS)}")
        return self.commands[COMMANDS.index(name)]

    def permitted(self, kind: TokenKind) -> range:
        """Return the ids that a position of this kind may hold."""
        return {TokenKind.COMMAND: self.commands, TokenKind.TEXT: self.text, TokenKind.IMAGE: self.image}[kind]

    def name(self, token: int) -> str:
        """Return an id in words: ``"code 17"``, ``"piece 5"``, ``"[BOI1]"``, or ``"unused 58219"`` for padding rows.

        Raises:
            ValueError: if the id is outside the vocabulary.
        """
        if token in self.image:
            return f"code {token - self.image.start}"
        if token in self.text:
            return f"piece {token - self.text.start}"
        if token in self.commands:
            return COMMANDS[token - self.commands.start]
        if token in range(self.size, self.padded_size):
            return f"unused {token}"
        raise ValueError(f"id {token} is outside the vocabulary, which ends at {self.padded_size - 1}")
