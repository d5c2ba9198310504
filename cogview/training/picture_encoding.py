"""The settings by which a recipe encodes pictures with captions into its token stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cogview.data.builders.pictures import StorePaths
from cogview.data.builders.prepare import PictureSettings
from cogview.data.sources.tables import TableOptions
from cogview.vqvae.ranges import check_ranges

SIDE = "[8, 4096]"  # pixels of a side of an image at scale 1


@dataclass(frozen=True, kw_only=True)
class PictureEncodeSettings(PictureSettings):
    """The ``encode`` section of a recipe with ``pictures``.

    Args:
        pictures: Sources of pictures with captions, as ``cogview data build`` reads them.
        table: Folder and columns of sources that are tables; with ``boxes_column``, ``named`` is set, and with
            ``source_column``, ``source`` is.
        side: Side of the images at scale 1, in pixels.

    Raises:
        ValueError: A number is out of range, there are no sources, or ``named`` or ``source`` is set without
            its column.
    """

    pictures: tuple[Path, ...]
    table: TableOptions = field(default_factory=TableOptions)
    side: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"side": SIDE})
        if not self.pictures:
            raise ValueError("pictures must name at least one source")
        if self.named and self.table.boxes_column is None:
            raise ValueError("named needs a column of boxes, table: {boxes_column: NAME}, or leave it out")
        if self.source and self.table.source_column is None:
            raise ValueError("source needs a column of pictures, table: {source_column: NAME}, or leave it out")
        object.__setattr__(self, "named", self.table.boxes_column is not None)
        object.__setattr__(self, "source", self.table.source_column is not None)


@dataclass(frozen=True, kw_only=True)
class RecipeStorePaths(StorePaths):
    """The stores of a recipe, under the names that ``cogview train`` looks for.

    Args:
        validation_store: Folder of the held-out store.
    """

    validation_store: Path

    @property
    def held_out(self) -> Path:
        """Folder of the held-out store."""
        return self.validation_store
