"""Captions in COCO's JSON: a list of images with ids, and a list of annotations with captions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogview.data.sources.names import NamedPictures
from cogview.data.sources.records import MAX_SOURCE_BYTES, PictureFile, PictureRecord
from cogview.data.sources.tables import TableOptions, unnamed_records
from cogview.errors import InputError
from cogview.input_files import read_regular
from cogview.plain_data import parse_json

_EXPECTED = 'expected COCO\'s {"images": [{"id", "file_name"}, …], "annotations": [{"image_id", "caption"}, …]}'


class CocoCaptions:
    """The images of a COCO file in its order, each with all its captions.

    Args:
        path: The JSON file.
        options: The folder of the pictures.

    Raises:
        InputError: The file cannot be read, or has another form.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        folder = path.parent if options.folder is None else options.folder
        try:
            content = parse_json(read_regular(path, MAX_SOURCE_BYTES))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from None
        images, annotations = (_objects(content, key, path) for key in ("images", "annotations"))
        captions: dict[Any, list[str]] = defaultdict(list)
        problems = []
        known = {_id(image["id"]) for image in images if image.get("id") is not None}
        for number, annotation in enumerate(annotations):
            text, image = annotation.get("caption"), _id(annotation.get("image_id"))
            name = f"{path}, annotation {annotation.get('id', number)}"
            if not isinstance(text, str) or not text.strip():
                problems.append(PictureRecord(name=name, problem="an annotation without a caption"))
            elif image not in known:
                problems.append(PictureRecord(name=name, problem=f"a caption without a picture: no image {image}"))
            else:
                captions[image].append(text.strip())
        self._records = [_record(path, folder, image, captions) for image in images] + problems
        named = NamedPictures()
        for record in self._records:
            named.add(record)
        named.find_others()
        self._records += unnamed_records(named, path)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[PictureRecord]:
        return iter(self._records)


def _record(path: Path, folder: Path, image: Mapping[str, Any], captions: Mapping[Any, list[str]]) -> PictureRecord:
    """Return the record of an entry of ``images``."""
    identity, name = _id(image.get("id")), image.get("file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return PictureRecord(name=f"{path}, image {identity}", problem="an image without a file_name")
    file = folder / name.strip()
    if image.get("id") is None:
        return PictureRecord(name=str(file), problem="an image without an id, which no annotation can name")
    if identity not in captions:
        return PictureRecord(name=str(file), problem=f"a picture without a caption: {path} has no annotation for it")
    return PictureRecord(name=str(file), captions=tuple(captions[identity]), file=PictureFile(path=file))


def _objects(content: Any, key: str, path: Path) -> list[Mapping[str, Any]]:
    """Return a list of objects in a COCO file."""
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise InputError(f'{path} has no list of objects under "{key}"; {_EXPECTED}')
    return found


def _id(value: Any) -> str:
    """Return an id, which some files have as a number and some as text."""
    return str(value)
