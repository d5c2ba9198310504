"""Columns of a table that name pictures and hold captions: given, or guessed from usual names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from cogview.errors import InputError
from cogview.formatting import format_list, shorten
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
    *("描述", "图片描述", "图像描述", "文字描述", "文本描述", "说明", "图片说明", "图像说明", "文字说明", "说明文字"),
    *(
        "图注",
        "图说",
        "配文",
        "文案",
        "注释",
        "内容",
        "文本",
        "文字",
        "标题",
        "图片标题",
        "提示词",
        "提示",
        "标注",
        "名称",
    ),
    *(
        "說明",
        "圖片描述",
        "圖片說明",
        "文字說明",
        "說明文字",
        "圖說",
        "標題",
        "圖片標題",
        "註釋",
        "內容",
        "標註",
        "名稱",
    ),
    *("中文", "chinese", "zh"),
)

# Marks of a language: models are of Chinese text, so a column that has one comes before one of the same table without.
_CHINESE = re.compile(r"(?:中文|汉语|漢語|chinese|zh|cn)_?(.+)|(.+?)_?(?:\(中文\)|中文)|(.+)_(?:chinese|zh|cn)")
_NUMBERED = re.compile(r"(.*?)[ _-]?\d+")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table.

    Args:
        picture: Column with the path of the picture.
        captions: Columns with captions, of which a row needs one.
        boxes: Column with named boxes.
        source: Column with the path of the picture before an edit, which the captions ask for.
        is_guessed: Whether a column was guessed.
    """

    picture: str
    captions: tuple[str, ...]
    boxes: str | None = None
    source: str | None = None
    is_guessed: bool = False

    def __str__(self) -> str:
        captions = _listed(self.captions)
        return f'pictures in "{self.picture}", captions in {captions}'


def choose_columns(
    names: Sequence[str],
    picture: str | None,
    captions: Sequence[str],
    where: str,
    boxes: str | None = None,
    source: str | None = None,
) -> Columns:
    """Return the columns of a table.

    Args:
        names: The columns that the table has.
        picture: The column of pictures; None to guess it.
        captions: The columns of captions; none to guess them. ``caption_1``, ``caption_2``, … are guessed together.
        where: Name of the table, for messages.
        boxes: The column of named boxes, which is never guessed.
        source: The column of pictures before an edit, which is never guessed.

    Raises:
        InputError: A given column is not there, or none can be guessed.
    """
    for name in (*(each for each in (picture, boxes, source) if each is not None), *captions):
        if name not in names:
            raise InputError(f'{where} has no column "{name}"; its columns: {_listed(names)}')
    by_plain = {_plain(name): name for name in reversed(names)}
    chosen = picture or next((by_plain[name] for name in PICTURE_NAMES if name in by_plain), None)
    if chosen is None:
        raise InputError(
            f"the column of pictures in {where} is not known; choose it by --image-column among {_listed(names)}"
        )
    texts = tuple(captions) or _guess_captions([(_unmarked(each), each) for each in names])
    texts = texts or _guess_captions([(_plain(each), each) for each in names])
    if not texts:
        others = [name for name in names if name != chosen]
        if not others:
            raise InputError(
                f'captions need a column "caption" beside that of pictures, which is the only column of {where}'
            )
        raise InputError(
            f"the column of captions in {where} is not known; choose it by --caption-column among {_listed(others)}"
        )
    is_guessed = picture is None or not captions
    return Columns(picture=chosen, captions=texts, boxes=boxes, source=source, is_guessed=is_guessed)


def _guess_captions(columns: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the columns of the first usual name that a table has, alone or with numbers; none without one.

    Args:
        columns: Plain name and name of each column.
    """
    for name in CAPTION_NAMES:
        if alone := [column for plain, column in columns if plain == name]:
            return (alone[0],)
        numbered = [column for plain, column in columns if (found := _NUMBERED.fullmatch(plain)) and found[1] == name]
        if numbered:
            return tuple(numbered)
    return ()


def _unmarked(name: str) -> str:
    """Return the plain name of a column without the mark of Chinese that it has; nothing for one without a mark."""
    found = _CHINESE.fullmatch(_plain(name))
    return next(filter(None, found.groups())) if found else ""


def _plain(name: str) -> str:
    """Return a name of a column without differences of case, width, spaces and hyphens."""
    return re.sub(r"[\s-]+", "_", unicodedata.normalize("NFKC", name).strip().casefold())


def _listed(names: Sequence[str]) -> str:
    return format_list(f'"{shorten(name, SHOWN)}"' for name in names)
