"""Collect real pictures with Chinese captions from installed Debian packages.

    apt-get install tuxpaint-stamps-default pysiogame gcompris-qt-data iso-flags-png-320x240 iso-codes \\
        unicode-cldr-core librsvg2-bin
    python scripts/real_pictures.py pictures

FOLDER then holds PNG and JPEG files and captions.csv (image, caption, paragraph, part, source, licence), a source of
``cogview data build`` and of a recipe. Nothing is downloaded. The parts:

  stamps       drawings and cut-outs of photographs of Tux Paint, captioned in zh_CN; no letters and coins
  art4apps     drawings of Art4Apps, shipped by pysiogame; the file names are translated by GCompris and the CLDR
  gcompris     drawings of Art4Apps, shipped by GCompris with a Chinese word each
  photographs  photographs of GCompris with a title and a paragraph, in traditional characters there
  flags        flags of countries
  objects      photographs of GCompris of 320 pixels: tools, fish, buildings, energy; named in this script

The first five make 1,496 pictures. ``--photos`` collects photographs alone: photographs, objects, and the stamps that
look like cut-outs of photographs.
"""

from __future__ import annotations

import csv
import gettext
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import click
import numpy as np
from PIL import Image

from cogview.cli.main import run_command
from cogview.cli.options import Command
from cogview.errors import InputError

STAMPS = Path("/usr/share/tuxpaint/stamps")
ART4APPS = Path("/usr/share/games/pysiogame/res/images/art4apps")
GCOMPRIS = Path("/usr/share/gcompris-qt")
FLAGS = Path("/usr/share/iso-flags-png-320x240")
COUNTRIES = Path("/usr/share/iso-codes/json/iso_3166-1.json")
COUNTRY_NAMES = Path("/usr/share/locale/zh_CN/LC_MESSAGES/iso_3166-1.mo")
CLDR = Path("/usr/share/unicode/cldr/common/annotations")
PACKAGES = {
    STAMPS: "tuxpaint-stamps-default",
    ART4APPS: "pysiogame",
    GCOMPRIS: "gcompris-qt-data",
    FLAGS: "iso-flags-png-320x240",
    COUNTRIES: "iso-codes",
    COUNTRY_NAMES: "iso-codes",
    CLDR: "unicode-cldr-core",
}

STAMP_SIDE = 256  # of rendered SVG stamps, pixels
# Median absolute Laplacian of the opaque pixels, of 255. Shaded photographs lie above, flat drawings below; of the
# 296 stamps above it, about one in ten is a drawing.
PHOTO_TEXTURE = 5.0
JPEG_QUALITY = 95

# Words of the file names of GCompris' activity "categorization", which names only the categories.
OBJECTS = {
    "alphabets": None,  # pictures of letters and digits: no things
    "numbers": None,
    "fish": "鱼",
    "IndiaGate": "印度门",
    "arcDeTriomphe": "凯旋门",
    "bayterek": "巴伊捷列克塔",
    "brandenburgGate": "勃兰登堡门",
    "burj": "哈利法塔",
    "cathedral": "大教堂",
    "christTheRedeemer": "基督像",
    "colosseum": "罗马斗兽场",
    "eiffelTower": "埃菲尔铁塔",
    "empireState": "帝国大厦",
    "greatPyramid": "大金字塔",
    "greatWall": "长城",
    "jucheTower": "主体思想塔",
    "kutubMinar": "顾特卜塔",
    "leMusee": "卢浮宫",
    "leaningTowerOfPisa": "比萨斜塔",
    "monument": "古迹",
    "mountRushmore": "拉什莫尔山",
    "operaHouse": "悉尼歌剧院",
    "parthenon": "帕特农神庙",
    "statueOfLiberty": "自由女神像",
    "tajMahal": "泰姬陵",
    "usCapitol": "美国国会大厦",
    "victoriaMemorial": "维多利亚纪念堂",
    "zimniPalace": "冬宫",
    "baseball": "棒球",
    "blackslate": "石板",
    "bucket": "水桶",
    "buffetset": "餐具柜",
    "bulb": "灯泡",
    "chair": "椅子",
    "cup": "杯子",
    "erasers": "橡皮",
    "igloo": "冰屋",
    "knife": "刀",
    "pan": "平底锅",
    "pencil": "铅笔",
    "pillow": "枕头",
    "plate": "盘子",
    "spoons": "勺子",
    "volleyball": "排球",
    "weighingMachine": "秤",
    "dam": "水坝",
    "geothermal": "地热电站",
    "solar": "太阳能电池板",
    "windmill": "风力发电机",
    "cuttingTool": "切割工具",
    "hammer": "锤子",
    "measuringTape": "卷尺",
    "multimeter": "万用表",
    "nailCutter": "指甲刀",
    "plier": "钳子",
    "scissors": "剪刀",
    "screwDriver": "螺丝刀",
    "sickle": "镰刀",
    "sideCutter": "斜口钳",
    "spray": "喷枪",
    "tweezer": "镊子",
    "wrench": "扳手",
}


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Args:
        name: Name of the file, without suffix.
        image: The picture.
        caption: Its name in Chinese, simplified.
        source: Where the package holds it.
        licence: The licence as the package states it.
        paragraph: A text about it, or "".
    """

    name: str
    image: Image.Image
    caption: str
    source: str
    licence: str
    paragraph: str = ""


def stamps(*, photos: bool = False) -> Iterator[Picture]:
    """Yield the stamps of Tux Paint with a caption in zh_CN, without its letters and coins.

    Args:
        photos: Yield only what looks like a cut-out of a photograph.
    """
    for text in sorted(STAMPS.rglob("*.txt")):
        prefix = "zh_CN.utf8="
        lines = text.read_text("utf8").split("\n")[1:]  # the first is English
        caption = next((line.removeprefix(prefix) for line in lines if line.startswith(prefix)), "")
        path = next((path for end in (".png", ".svg") if (path := text.with_suffix(end)).exists()), None)
        if not caption or path is None or "symbols" in text.parts:
            continue
        image = Image.open(path) if path.suffix == ".png" else rendered_svg(path)
        if photos and (text.with_suffix(".svg").exists() or texture(image) < PHOTO_TEXTURE):
            continue
        yield Picture(
            name="-".join(path.relative_to(STAMPS).with_suffix("").parts),
            image=image,
            caption=caption,
            source=str(path),
            licence="GPL-2; origins per picture in the package",
        )


def rendered_svg(path: Path) -> Image.Image:
    """Return an SVG file as a picture of ``STAMP_SIDE`` pixels at its longer side."""
    size = str(STAMP_SIDE)
    arguments = ["rsvg-convert", "--keep-aspect-ratio", "--width", size, "--height", size, str(path)]
    return Image.open(io.BytesIO(subprocess.run(arguments, check=True, capture_output=True).stdout))


def texture(image: Image.Image) -> float:
    """Return the median absolute Laplacian of the opaque pixels, of 255; 0 if there are few."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.int16)
    opaque, colours = pixels[..., 3] > 250, pixels[..., :3]
    laplacian = (
        4 * colours[1:-1, 1:-1] - colours[:-2, 1:-1] - colours[2:, 1:-1] - colours[1:-1, :-2] - colours[1:-1, 2:]
    )
    inner = opaque[1:-1, 1:-1] & opaque[:-2, 1:-1] & opaque[2:, 1:-1] & opaque[1:-1, :-2] & opaque[1:-1, 2:]
    values = np.abs(laplacian).mean(axis=-1)[inner]
    return float(np.median(values)) if len(values) > 50 else 0.0


def art4apps() -> Iterator[Picture]:
    """Yield the drawings of Art4Apps that pysiogame ships and whose file name is translated."""
    words = {**cldr_words(), **gcompris_words()}
    for path in sorted(ART4APPS.rglob("*.jpg")):
        caption = translated(path.stem.replace("_", " "), words)
        if caption:
            source, licence = str(path), "CC-BY-SA (CREDITS of pysiogame)"
            yield Picture(f"{path.parent.name}-{path.stem}", Image.open(path), caption, source, licence)


def translated(english: str, words: dict[str, str]) -> str | None:
    """Return the Chinese of an English word, also of its singular; None if it is unknown."""
    singulars = (english, english.removesuffix("s"), english.removesuffix("es"), re.sub("ies$", "y", english))
    return next((words[word] for word in singulars if word in words), None)


def gcompris() -> Iterator[Picture]:
    """Yield the drawings of Art4Apps that GCompris ships with a Chinese word."""
    words = gcompris_words()
    for name, data in resources("lang").items():
        word = Path(name).stem
        if name.endswith(".webp") and word in words:
            image = Image.open(io.BytesIO(data))
            yield Picture(f"word-{word}", image, words[word], f"lang.rcc:{name}", "CC-BY-SA-3.0")


@cache
def gcompris_words() -> dict[str, str]:
    """Return GCompris' Chinese of English words."""
    content = json.loads(resources("lang")["/gcompris/src/activities/lang/resource/content-zh_CN.json"])
    return {name.removesuffix(".ogg"): chinese for name, chinese in content.items() if chinese}


def cldr_words() -> dict[str, str]:
    """Return the CLDR's Chinese names of emoji by their English names."""
    english, chinese = (
        {
            element.get("cp"): element.text or ""
            for element in ElementTree.parse(CLDR / f"{language}.xml").iter("annotation")
            if element.get("type") == "tts"
        }
        for language in ("en", "zh")
    )
    return {name.lower(): chinese[symbol] for symbol, name in english.items() if chinese.get(symbol)}


BOARD_ENTRY = re.compile(
    r'"title": qsTr\("((?:[^"\\]|\\.)*)"\),\s*"text": qsTr\("((?:[^"\\]|\\.)*)"\),.*?"image2": "qrc:([^"]*)"', re.DOTALL
)


def photographs() -> Iterator[Picture]:
    """Yield the photographs of GCompris that have a title and a paragraph, in simplified characters."""
    try:
        from opencc import OpenCC
    except ImportError:
        raise InputError('converting characters needs the package opencc: pip install "cogview[data]"') from None
    simplified = OpenCC("tw2sp").convert
    chinese = translations((GCOMPRIS / "translations/gcompris_zh_TW.qm").read_bytes())
    for activity in ("farm_animals", "world_animals", "monuments", "world_music"):
        files = resources(f"explore_{activity}")
        boards = [data.decode() for name, data in sorted(files.items()) if "/board/" in name]
        for title, text, image in BOARD_ENTRY.findall("\n".join(boards)):
            caption, paragraph = (
                simplified(chinese[english.replace('\\"', '"')]).replace("牠", "它")  # OpenCC keeps it
                for english in (title, text)
            )
            yield Picture(
                name=f"{activity}-{Path(image).stem}",
                image=Image.open(io.BytesIO(files[image])),
                caption=caption,
                source=f"explore_{activity}.rcc:{image}",
                licence="public domain, CC0 or CC-BY-SA; per picture in the README of the resource",
                paragraph=paragraph,
            )


def objects() -> Iterator[Picture]:
    """Yield the photographs of things and buildings by which GCompris teaches categories."""
    for name, data in resources("categorization").items():
        path = Path(name)
        if path.suffix == ".webp":
            caption = OBJECTS[re.sub(r"\d+$", "", path.stem)]
            if caption is not None:
                image, licence = Image.open(io.BytesIO(data)), "per picture in the README of the resource"
                yield Picture(f"object-{path.stem}", image, caption, f"categorization.rcc:{name}", licence)


def flags() -> Iterator[Picture]:
    """Yield the flags of the countries of ISO 3166."""
    with COUNTRY_NAMES.open("rb") as file:
        chinese = gettext.GNUTranslations(file).gettext
    for country in json.loads(COUNTRIES.read_text("utf8"))["3166-1"]:
        path = FLAGS / f"{country['alpha_2'].lower()}.png"
        if path.exists():
            caption = chinese(country.get("common_name", country["name"])) + "国旗"
            yield Picture(f"flag-{path.stem}", Image.open(path), caption, str(path), "public domain")


def resources(name: str) -> dict[str, bytes]:
    """Return the files of a Qt binary resource of GCompris by their paths."""
    content = (GCOMPRIS / f"rcc/{name}.rcc").read_bytes()
    version, tree, data, names = struct.unpack(">IIII", content[4:20])
    node_size = 14 if version < 2 else 22
    files = {}

    def visit(index: int, parent: str) -> None:
        start = tree + index * node_size
        name_offset, flags = struct.unpack(">IH", content[start : start + 6])
        path = parent
        if index:  # the root has no name
            (length,) = struct.unpack(">H", content[names + name_offset : names + name_offset + 2])
            first = names + name_offset + 6
            path += "/" + content[first : first + 2 * length].decode("utf-16-be")
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", content[start + 6 : start + 14])
            for child in range(first, first + count):
                visit(child, path)
        else:
            (offset,) = struct.unpack(">I", content[start + 10 : start + 14])
            (length,) = struct.unpack(">I", content[data + offset : data + offset + 4])
            stored = content[data + offset + 4 : data + offset + 4 + length]
            files[path] = zlib.decompress(stored[4:]) if flags & 1 else stored

    visit(0, "")
    return files


def translations(content: bytes) -> dict[str, str]:
    """Return the translations of a Qt .qm file by their English texts."""
    sections, position = {}, 16  # after the magic number
    while position < len(content):
        kind, length = struct.unpack(">BI", content[position : position + 5])
        sections[kind] = content[position + 5 : position + 5 + length]
        position += 5 + length
    messages, position = sections[0x69], 0
    found, fields = {}, {}
    while position < len(messages):
        tag = messages[position]
        position += 1
        if tag == 1:  # the end of a message; 3 is its translation, 6 its English text
            if {3, 6} <= fields.keys():
                found[fields[6].decode("utf8")] = fields[3].decode("utf-16-be")
            fields = {}
        elif tag == 5:  # a number
            position += 4
        else:
            (length,) = struct.unpack(">i", messages[position : position + 4])
            fields[tag] = messages[position + 4 : position + 4 + max(length, 0)]
            position += 4 + max(length, 0)
    return found


PARTS: dict[str, tuple[Callable[..., Iterator[Picture]], tuple[Path, ...]]] = {
    "stamps": (stamps, (STAMPS,)),
    "art4apps": (art4apps, (ART4APPS, GCOMPRIS, CLDR)),
    "gcompris": (gcompris, (GCOMPRIS,)),
    "photographs": (photographs, (GCOMPRIS,)),
    "flags": (flags, (FLAGS, COUNTRIES, COUNTRY_NAMES)),
    "objects": (objects, (GCOMPRIS,)),
}
DEFAULT = ("stamps", "art4apps", "gcompris", "photographs", "flags")
PHOTOS = ("photographs", "objects", "stamps")


def check_packages(parts: tuple[str, ...]) -> None:
    """Check that the packages of the parts are installed.

    Raises:
        InputError: Packages are missing; the message holds the command that installs them.
    """
    missing = {PACKAGES[path] for part in parts for path in PARTS[part][1] if not path.exists()}
    if "stamps" in parts and shutil.which("rsvg-convert") is None:
        missing.add("librsvg2-bin")
    if missing:
        raise InputError(f"packages are missing: apt-get install {' '.join(sorted(missing))}")


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="collect this part; repeatable")
@click.option("--photos", is_flag=True, help="collect photographs alone: photographs, objects and cut-outs")
def command(folder: Path, parts: tuple[str, ...], photos: bool) -> int:
    """Collect real pictures with Chinese captions from installed Debian packages into FOLDER."""
    if parts and photos:
        raise InputError("--photos chooses the parts: leave --part out")
    parts = PHOTOS if photos else parts or DEFAULT
    check_packages(parts)
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    captions, names = set(), set()
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "paragraph", "part", "source", "licence"])
        for part in parts:
            collect = PARTS[part][0]
            for picture in collect(photos=True) if photos and part == "stamps" else collect():
                name = saved(replace(picture, name=f"{part}-{picture.name}"), folder)  # parts share names
                assert name not in names, name  # one would replace the other
                names.add(name)
                table.writerow([name, picture.caption, picture.paragraph, part, picture.source, picture.licence])
                counts[part] += 1
                captions.add(picture.caption)
    for part, count in counts.items():
        print(f"{part}: {count}", file=sys.stderr)
    print(f"{counts.total()} pictures, {len(captions)} distinct captions", file=sys.stderr)
    print(folder / "captions.csv")
    return 0


def saved(picture: Picture, folder: Path) -> str:
    """Save a picture, as PNG if it is transparent or has a palette, else as JPEG; return the name of the file."""
    if picture.image.mode == "RGB":
        name = f"{picture.name}.jpg"
        picture.image.save(folder / name, quality=JPEG_QUALITY)
    else:
        name = f"{picture.name}.png"
        picture.image.save(folder / name)
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    return run_command(command, argv, "real_pictures.py")


if __name__ == "__main__":
    sys.exit(main())
