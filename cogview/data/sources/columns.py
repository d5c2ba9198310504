"""Columns of a table that name pictures and hold captions: given, or guessed from usual names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from cogview.errors import InputError
from cogview.formatting import shorten
from cogview.tables import SHOWN

# The first name that a table has is taken.
PICTURE_NAMES = (
    *("image", "image_path", "image_file", "img", "img_path", "picture", "photo", "file_name", "filename", "file"),
    *("file_path", "filepath", "path", "image_name", "jpg", "png"),
    *("图片", "图像", "照片", "图片路径", "图像路径", "图片名", "图片文件", "文件名", "文件", "文件路径", "路径"),
    *("圖片", "圖像", "檔名", "檔案", "路徑"),
)
CAPTION_NAMES = (
    *("caption", "captions", "text", "description", "prompt", "sentence", "title", "alt", "alt_text"),
    *("描述", "图片描述", "图像描述", "说明", "图片说明", "文本", "文字", "标题", "提示词", "提示", "标注", "名称"),
    *("說明", "標題", "文字說明"),
)

_NUMBERED = re.compile(r"(.*?)[ _-]?\d+")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table.

    Args:
        picture: Column with the path of the picture.
        captions: Columns with captions, of which a row needs one.
        boxes: Column with named boxes.
        is_guessed: Whether a column was guessed.
    """

    picture: str
    captions: tuple[str, ...]
    boxes: str | None = None
    is_guessed: bool = False

    def __str__(self) -> str:
        captions = ", ".join(f'"{name}"' for name in self.captions)
        return f'pictures in "{self.picture}", captions in {captions}'


def choose_columns(
    names: Sequence[str], picture: str | None, captions: Sequence[str], where: str, boxes: str | None = None
) -> Columns:
    """Return the columns of a table.

    Args:
        names: The columns that the table has.
        picture: The column of pictures; None to guess it.
        captions: The columns of captions; none to guess them. ``caption_1``, ``caption_2``, … are guessed together.
        where: Name of the table, for messages.
        boxes: The column of named boxes, which is never guessed.

    Raises:
        InputError: A given column is not there, or none can be guessed.
    """
    for name in (*(each for each in (picture, boxes) if each is not None), *captions):
        if name not in names:
            raise InputError(f'{where} has no column "{name}"; its columns: {_listed(names)}')
    by_plain = {_plain(name): name for name in reversed(names)}
    chosen = picture or next((by_plain[name] for name in PICTURE_NAMES if name in by_plain), None)
    if chosen is None:
        raise InputError(
            f"the column of pictures in {where} is not known; choose it by --image-column among {_listed(names)}"
        )
    texts = tuple(captions)
    for name in CAPTION_NAMES:
        if not texts:
            numbered = [other for other in names if (found := _NUMBERED.fullmatch(_plain(other))) and found[1] == name]
            texts = (by_plain[name],) if name in by_plain else tuple(numbered)
    if not texts:
        raise InputError(
            f"the column of captions in {where} is not known; choose it by --caption-column among {_listed(names)}"
        )
    return Columns(picture=chosen, captions=texts, boxes=boxes, is_guessed=picture is None or not captions)


def _plain(name: str) -> str:
    """Return a name of a column without differences of case, width, spaces and hyphens."""
    return re.sub(r"[\s-]+", "_", unicodedata.normalize("NFKC", name).strip().casefold())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{shorten(name, SHOWN)}"' for name in names)
