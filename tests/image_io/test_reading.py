"""Images that users give: planted pixels come back upright, opaque and in 8 bits; what cannot be used is one line."""

import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.errors import InputError
from cogview.image_io import reading as images
from cogview.image_io.png import SAMPLING_KEYS, save_png, sheet_metadata
from cogview.image_io.reading import EXPECTED, find_images, fit, read_image
from tests.factories import input_error

RED, GREEN, BLUE = (220, 20, 10), (10, 200, 30), (15, 25, 210)
ORIENTATION = 0x0112  # the EXIF tag


def picture_of(rows, mode="RGB"):
    """An image with these pixels."""
    image = Image.new(mode, (len(rows[0]), len(rows)))
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            image.putpixel((x, y), value)
    return image


def pixels(image):
    assert image.mode == "RGB"
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def greys(image):
    assert [pixel for row in pixels(image) for pixel in row if len(set(pixel)) != 1] == []
    return [[pixel[0] for pixel in row] for row in pixels(image)]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png_header(width, height):
    """A PNG that says its size and has no pixels: whoever decodes it finds it cut off."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    )


# Reading: modes


@pytest.mark.parametrize(
    ("mode", "stored", "expected"),
    [
        ("RGB", RED, RED),
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 51), (204, 204, 204)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
        ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_read_image_converts_every_mode_to_rgb_on_white(tmp_path, mode, stored, expected):
    picture_of([[stored]], mode).save(tmp_path / "a.tif")
    assert pixels(read_image(tmp_path / "a.tif")) == [[expected]]


@pytest.mark.parametrize("transparency", [2, b"\xff\xff\x00"])  # one colour of the palette, or an alpha for each
def test_read_image_whitens_transparent_palette_colour(tmp_path, transparency):
    image = picture_of([[0, 1, 2]], "P")
    image.putpalette([*RED, *GREEN, *BLUE])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert pixels(read_image(tmp_path / "a.png")) == [[RED, GREEN, (255, 255, 255)]]


def test_read_image_whitens_transparent_colour_without_alpha(tmp_path):
    picture_of([[RED, GREEN]]).save(tmp_path / "rgb.png", transparency=GREEN)
    picture_of([[7, 8]], "L").save(tmp_path / "grey.png", transparency=7)
    picture_of([[7000, 8000]], "I;16").save(tmp_path / "grey16.png", transparency=8000)
    assert pixels(read_image(tmp_path / "rgb.png")) == [[RED, (255, 255, 255)]]
    assert greys(read_image(tmp_path / "grey.png")) == [[255, 8]]
    assert greys(read_image(tmp_path / "grey16.png")) == [[27, 255]]


@pytest.mark.parametrize(
    ("mode", "suffix", "stored", "expected"),
    [
        ("I;16", ".png", [0, 128, 129, 257, 32768, 65535], [0, 0, 1, 1, 128, 255]),
        ("I;16", ".png", [0, 4096, 8192], [0, 16, 32]),  # dark stays dark
        ("I;16", ".png", [0, 100, 200], [0, 100, 200]),  # 8 bits in 16
        ("I;16", ".tif", [0, 100, 255], [0, 100, 255]),
        ("I;16", ".tif", [0, 341, 1023], [0, 85, 255]),  # 10 bits in 16
        ("I;16", ".tif", [0, 1365, 4000], [0, 85, 249]),  # 12 bits in 16
        ("I", ".tif", [0, 100, 200], [0, 100, 200]),
        ("I;16", ".tif", [0, 257, 65535], [0, 1, 255]),
        ("I", ".tif", [-5, 257, 65535], [0, 1, 255]),
        ("I", ".tif", [0, 2**29, 2**30], [0, 128, 255]),
        ("F", ".tif", [0.0, 0.2, 1.0], [0, 51, 255]),
        ("F", ".tif", [0.0, 0.2, 0.2], [0, 51, 51]),
        ("F", ".tif", [-1.0, 51.4, 255.0], [0, 51, 255]),
        ("F", ".tif", [0.0, 257.0, 65535.0], [0, 1, 255]),
        ("F", ".tif", [0.0, 4e5, 2e6], [0, 51, 255]),
        ("F", ".tif", [float("nan"), float("inf"), 1.0], [0, 0, 255]),
        ("F", ".tif", [0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_read_image_scales_high_bit_depths(tmp_path, mode, suffix, stored, expected):
    path = tmp_path / f"a{suffix}"
    picture_of([stored], mode).save(path)
    assert greys(read_image(path)) == [expected]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
def test_read_image_detects_format_by_content(tmp_path, kind):
    (tmp_path / "image.data").write_bytes(encoded(Image.new("RGB", (16, 8), (255, 255, 255)), kind))
    assert greys(read_image(tmp_path / "image.data")) == [[255] * 16] * 8


def test_read_image_takes_first_frame(tmp_path):
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    assert pixels(read_image(tmp_path / "a.webp")) == [[RED] * 4] * 4


def test_read_image_closes_file(tmp_path):
    path = tmp_path / "a.png"
    noise(8, 8).save(path)
    image = read_image(path)
    path.unlink()
    assert pixels(image) == pixels(noise(8, 8))


@pytest.mark.parametrize(
    ("mode", "greatest", "note"),
    [
        ("I;16", 200, "its values reach 200, so 255 was taken for white"),
        ("I;16", 4000, "its values reach 4000, so 4095 was taken for white"),
        ("I", 2**30, "its values reach 1.07374e+09, so 1.07374e+09 was taken for white"),
        ("I;16", 5000, None),
        ("F", 1.0, None),
        ("F", 3.0, "its values reach 3, so 255 was taken for white"),
    ],
)
def test_read_image_notes_an_unusual_white(tmp_path, mode, greatest, note):
    picture_of([[0, greatest]], mode).save(tmp_path / "a.tif")
    notes = []
    read_image(tmp_path / "a.tif", notes.append)
    assert notes == ([] if note is None else [note])


# Reading: formats


def postscript(width, height):
    """A PostScript file; whoever decodes it starts Ghostscript."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 {width} {height}\n%%EndComments\nshowpage\n".encode()


@pytest.mark.parametrize("content", [postscript(8, 8), encoded(Image.new("RGB", (8, 8)), "PCX"), b"P6 1 1 255 \0\0"])
def test_read_image_opens_named_formats_alone(tmp_path, monkeypatch, content):
    """PostScript under the name of a PNG would be run by Ghostscript; no reader of another format may start."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **_: started.append(arguments))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert str(path) in input_error(read_image, path)
    assert not started


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"])
def test_read_image_reads_every_suffix_that_is_looked_for(tmp_path, suffix):
    assert suffix in images.IMAGE_SUFFIXES
    Image.new("L" if suffix == ".pgm" else "RGB", (16, 8), "white").save(tmp_path / f"a{suffix}")
    assert greys(read_image(tmp_path / f"a{suffix}")) == [[255] * 16] * 8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_read_image_refuses_a_pipe_at_once(tmp_path):
    """Opening a named pipe waits for a writer that may never come."""
    os.mkfifo(tmp_path / "a.png")
    assert input_error(read_image, tmp_path / "a.png") == (
        f"image {tmp_path / 'a.png'} is no regular file; expected an image file"
    )


# Reading: colour profiles


def profile_of(gamma, red=(0.64, 0.33), green=(0.30, 0.60), blue=(0.15, 0.06)):
    """Return an ICC profile of three colours, made from that of sRGB, with one exponent in place of its curve."""
    from PIL import ImageCms

    whole = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    white = (0.3127, 0.3290)

    def xyz(xy):
        return np.array([xy[0] / xy[1], 1, (1 - xy[0] - xy[1]) / xy[1]])

    primaries = np.stack([xyz(red), xyz(green), xyz(blue)], axis=1)
    columns = primaries * np.linalg.solve(primaries, xyz(white))
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scales = (bradford @ [0.96422, 1, 0.82521]) / (bradford @ xyz(white))
    columns = np.linalg.solve(bradford, scales[:, None] * (bradford @ columns))  # to the white of profiles, D50
    count = struct.unpack_from(">I", whole, 128)[0]
    for entry in range(count):
        name, offset, _ = struct.unpack_from(">4sII", whole, 132 + 12 * entry)
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            column = columns[:, b"rgb".index(name[0])]
            struct.pack_into(">3i", whole, offset + 8, *(round(value * 65536) for value in column))
        elif name.endswith(b"TRC"):
            struct.pack_into(">4sIHHi", whole, offset, b"para", 0, 0, 0, round(gamma * 65536))
    return bytes(whole)


P3 = {"red": (0.680, 0.320), "green": (0.265, 0.690), "blue": (0.150, 0.060)}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_read_image_converts_display_p3_to_srgb(tmp_path, suffix):
    """Phones store photos so. Stored numbers alone would look paler than on their screens."""
    settings = {"quality": 100, "lossless": True} if suffix in (".jpg", ".webp") else {}
    stored = Image.new("RGB", (16, 16), (200, 100, 60))
    stored.save(tmp_path / f"a{suffix}", icc_profile=profile_of(2.2, **P3), **settings)
    [[pixel, *_], *_] = pixels(read_image(tmp_path / f"a{suffix}"))
    assert np.abs(np.subtract(pixel, (216, 92, 43))).max() <= 2  # by the linear matrix between both spaces
    assert pixels(read_image(tmp_path / f"a{suffix}")) == pixels(  # an image that a program has opened alike
        Image.fromarray(fit(Image.open(tmp_path / f"a{suffix}"), 16)[0])
    )


def test_read_image_converts_profile_with_transparency(tmp_path):
    image = picture_of([[(200, 100, 60, 255), (200, 100, 60, 0)]], "RGBA")
    image.save(tmp_path / "a.png", icc_profile=profile_of(2.2, **P3))
    image.quantize(4).save(tmp_path / "palette.png", icc_profile=profile_of(2.2, **P3))
    for name in ("a.png", "palette.png"):
        [[opaque, hidden]] = pixels(read_image(tmp_path / name))
        assert hidden == (255, 255, 255)
        assert np.abs(np.subtract(opaque, (216, 92, 43))).max() <= 2


def test_read_image_keeps_pixels_of_srgb_profile(tmp_path):
    from PIL import ImageCms

    image = noise(32, 32)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "a.png", icc_profile=profile)
    notes = []
    assert pixels(read_image(tmp_path / "a.png", notes.append)) == pixels(image)
    assert notes == []


@pytest.mark.parametrize("profile", [b"no profile", profile_of(2.2)[:200], b"\0" * 3144])
def test_read_image_ignores_broken_profile_with_a_note(tmp_path, profile):
    picture_of([[RED, BLUE]]).save(tmp_path / "a.png", icc_profile=profile)
    notes = []
    assert pixels(read_image(tmp_path / "a.png", notes.append)) == [[RED, BLUE]]
    [note] = notes
    assert note.startswith("its colour profile was ignored: ")


def test_read_image_ignores_profile_of_other_colours(tmp_path):
    picture_of([[(0, 255, 255, 0)]], "CMYK").save(tmp_path / "a.tif", icc_profile=profile_of(2.2))
    notes = []
    assert pixels(read_image(tmp_path / "a.tif", notes.append)) == [[(255, 0, 0)]]
    assert notes == ["its colour profile was ignored: it is for RGB, the image is CMYK"]


# Reading: EXIF


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, [[RED, GREEN, BLUE]]),
        (2, [[BLUE, GREEN, RED]]),
        (3, [[BLUE, GREEN, RED]]),
        (6, [[RED], [GREEN], [BLUE]]),  # a camera held upright, its left side now on top
        (8, [[BLUE], [GREEN], [RED]]),
        (99, [[RED, GREEN, BLUE]]),
    ],
)
def test_read_image_applies_exif_orientation_once(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture_of([[RED, GREEN, BLUE]]).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert pixels(image) == upright
    image.save(tmp_path / "again.png")
    assert pixels(read_image(tmp_path / "again.png")) == upright


def test_read_image_turns_portrait_photo(tmp_path):
    photo = Image.new("L", (32, 16), 0)
    photo.paste(255, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    assert greys(read_image(tmp_path / "a.jpg")) == [[0] * 16] * 16 + [[255] * 16] * 16


@pytest.mark.parametrize("exif", [b"", b"II", b"no TIFF at all", b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_read_image_ignores_damaged_exif(tmp_path, exif, suffix, recwarn):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (16, 8), (255, 255, 255)).save(path, exif=b"Exif\0\0" + exif)
    assert greys(read_image(path)) == [[255] * 16] * 8
    assert not recwarn.list


# Reading: what cannot be used


def test_read_image_refuses_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "没有.png"
    assert input_error(read_image, path) == f"image {path} does not exist"
    assert input_error(read_image, tmp_path) == f"{tmp_path} is a folder, expected an image file"
    assert input_error(read_image, Path("a\0b")).endswith("cannot be read: embedded null byte")

    def denied(self, *_):
        raise PermissionError(13, "Permission denied")

    path.touch()
    monkeypatch.setattr("pathlib.Path.open", denied)  # root may read anything
    assert input_error(read_image, path) == f"image {path} cannot be read: Permission denied"


@pytest.mark.parametrize(
    "content",
    ["一只狐狸\n".encode() * 40, b"<!DOCTYPE html><html>404</html>", b"\0" * 500, b"RIFF\0\0\0\0WAVEfmt ", b"x"],
)
def test_read_image_refuses_other_content(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert input_error(read_image, path) == f"{path} is no image that can be read; expected {EXPECTED}"


def test_read_image_refuses_empty_file(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    assert input_error(read_image, path) == f"{path} is empty, expected an image"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_read_image_refuses_truncated_file(tmp_path, kind, share, recwarn):
    path = tmp_path / "a.png"
    whole = encoded(noise(64, 64), kind)
    path.write_bytes(whole[: max(20, int(len(whole) * share))])
    message = input_error(read_image, path)
    if kind in ("png", "jpeg", "webp"):
        assert message.startswith(f"{path} is cut off or damaged: ")
    assert not recwarn.list


def test_read_image_refuses_damaged_file(tmp_path):
    path = tmp_path / "a.png"
    whole = bytearray(encoded(noise(64, 64), "png"))
    whole[200:300] = bytes(100)
    path.write_bytes(whole)
    assert input_error(read_image, path).startswith(f"{path} is cut off or damaged: ")


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_fit_refuses_image_without_pixels(tmp_path, size):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(*size))
    damaged = f"{path} is cut off or damaged: its header does not give the size of an image"
    assert input_error(read_image, path) == damaged
    too_small = f"the image is {size[0]} x {size[1]} pixels, expected at least 1 x 1"
    assert input_error(fit, Image.new("RGB", size), 8) == too_small


def test_read_image_refuses_large_image_by_header(tmp_path, recwarn):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(20_000, 20_000))
    assert input_error(read_image, path) == (
        f"{path} is 20000 x 20000 pixels, 400,000,000 in all; at most 64,000,000 are read: scale it down first"
    )
    path.write_bytes(png_header(1, 65_536))  # each row of a narrow image takes as long as one of a wide image
    assert input_error(read_image, path) == f"{path} is 1 x 65536 pixels; at most 65,535 a side are read: crop it first"
    path.write_bytes(png_header(8_000, 8_000))  # allowed, so it is decoded, and found without pixels
    assert input_error(read_image, path).startswith(f"{path} is cut off or damaged: ")
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_read_image_restores_limit_of_pillow(tmp_path, monkeypatch, kind):
    path = tmp_path / "a"
    path.write_bytes(encoded(Image.new("RGB", (12, 10), RED), kind))
    for pillows in (100, 10, None):  # Pillow would warn, raise, do nothing
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        monkeypatch.setattr(images, "MAX_PIXELS", 120)
        monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 120)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(path).size == (12, 10)
            monkeypatch.setattr(images, "MAX_PIXELS", 119)
            monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 119)
            assert "is 12 x 10 pixels, 120 in all; at most 119 are read" in input_error(read_image, path)
        assert pillows == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20), (20, 20_000)])
def test_fit_takes_extreme_sizes(tmp_path, size):
    path = tmp_path / "a.png"
    Image.new("RGB", size, RED).save(path)
    image = read_image(path)
    assert image.size == size
    assert np.array_equal(fit(image, 8)[0], np.full((8, 8, 3), RED))


# Finding


@pytest.fixture
def album(tmp_path, monkeypatch):
    """A folder of empty files, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.png",
        "a.JPG",
        "C.webp",
        "10.jpeg",
        ".hidden.png",
        "notes.txt",
        "png",
        "below/d.png",
        "名/狐狸.png",
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("folder.png").mkdir()
    return tmp_path


def found(*arguments):
    return [str(path) for path in find_images(arguments)]


def test_find_images_keeps_order_and_repeats(album):
    assert found("b.png", "a.JPG", "b.png") == ["b.png", "a.JPG", "b.png"]
    assert found("notes.txt", ".hidden.png", "missing.png") == ["notes.txt", ".hidden.png", "missing.png"]


def test_find_images_sorts_images_of_folder(album):
    assert found(".") == ["10.jpeg", "C.webp", "a.JPG", "b.png"]
    assert found("below", "b.png", "名/") == ["below/d.png", "b.png", "名/狐狸.png"]
    assert found(str(album / "名")) == [f"{album}/名/狐狸.png"]


def test_find_images_expands_pattern_like_shell(album):
    assert found("[a1]*.*", "*.webp") == ["10.jpeg", "a.JPG", "C.webp"]
    assert found("?.*", "名/*") == ["C.webp", "a.JPG", "b.png", "名/狐狸.png"]
    assert found("belo*") == ["below/d.png"]
    assert found("n*") == ["notes.txt"]


def test_find_images_notes_what_it_passes_over(album):
    """Photos of phones are HEIC by default: a folder of them must not look empty without a reason."""
    for name in ("fotos/a.gif", "fotos/b.HEIC", "fotos/c.avif", "fotos/notes.txt", "fotos/d.tiff", "fotos/e.bmp"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    notes = []
    assert list(map(str, find_images(["fotos", "fotos/b.HEIC"], notes.append))) == [
        "fotos/a.gif",
        "fotos/d.tiff",
        "fotos/e.bmp",
        "fotos/b.HEIC",
    ]
    assert notes == ["fotos: passed over b.HEIC, c.avif; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"]


def test_find_images_passes_over_contact_sheets_of_folder(album):
    """Sheets lie among their images: `cogview caption outputs/` captioned one as four crabs."""
    part = {"prompt": "猫", "seed": "7", "model": "m", "cogview": "0", "codes": "1 2"}
    part |= dict.fromkeys(SAMPLING_KEYS, "1")
    pixels = Image.new("RGB", (8, 8))
    Path("outputs").mkdir()
    save_png(Path("outputs/猫-seed7-0.png"), pixels, part)
    save_png(Path("outputs/grid-seed7.png"), pixels, sheet_metadata([part]))
    save_png(Path("outputs/grid-of-mine.png"), pixels, {})
    Path("outputs/grid-broken.png").touch()
    notes = []
    assert [path.name for path in find_images(["outputs"], notes.append)] == [
        "grid-broken.png",
        "grid-of-mine.png",
        "猫-seed7-0.png",
    ]
    assert notes == ["outputs: passed over contact sheets: grid-seed7.png"]
    assert found("outputs/grid-s*.png") == ["outputs/grid-seed7.png"]


def test_find_images_prefers_file_to_pattern(album):
    for name in ("[ab].png", "*.png", "a?"):
        Path(name).touch()
    assert found("[ab].png", "*.png", "a?") == ["[ab].png", "*.png", "a?"]
    Path("x[1]").mkdir()
    Path("x[1]/e.png").touch()
    assert found("x[1]") == ["x[1]/e.png"]
    assert found("x[[]1]/*") == ["x[1]/e.png"]


def test_find_images_refuses_when_nothing_matches(album, monkeypatch):
    assert input_error(find_images, []) == (
        "no image was given; name files, folders, or patterns such as 'photos/*.png'"
    )
    assert input_error(find_images, ["b.png", ""]) == (  # an empty variable of a shell was the working folder
        "the name of an image is empty; name files, folders, or patterns such as 'photos/*.png'"
    )
    assert input_error(find_images, ["b.png", "*.bmp"]) == 'the pattern "*.bmp" matches no file'
    assert input_error(find_images, ["folder.png"]) == (
        "the folder folder.png holds no image: looked for names in .png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff, "
        ".ppm, .pgm, not in folders below"
    )

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    assert input_error(find_images, ["below"]) == "the folder below cannot be read: Permission denied"


# Fitting


def thirds(width, height):
    """Red, green and blue beside each other, or one above the other where the image is high."""
    image = Image.new("RGB", (width, height), GREEN)
    long = max(width, height) // 3
    if width > height:
        image.paste(RED, (0, 0, long, height))
        image.paste(BLUE, (2 * long, 0, width, height))
    else:
        image.paste(RED, (0, 0, width, long))
        image.paste(BLUE, (0, 2 * long, width, height))
    return image


@pytest.mark.parametrize(("width", "height"), [(192, 64), (64, 192)])
def test_fit_keeps_middle(width, height):
    pixels_HWC, note = fit(thirds(width, height), 64)
    assert np.array_equal(pixels_HWC, np.full((64, 64, 3), GREEN))
    assert note == f"cropped from {width} x {height} to 64 x 64"


@pytest.mark.parametrize(("width", "height"), [(600, 400), (96, 64), (30, 20), (3000, 2000)])
@pytest.mark.parametrize("upright", [False, True])
def test_fit_keeps_geometry(width, height, upright):
    # Of 3 : 2 the middle 2 is kept: a quarter is red, half is green, a quarter is blue.
    image = thirds(width, height)
    side = 64
    pixels_HWC, note = fit(image.transpose(Image.Transpose.ROTATE_270) if upright else image, side)
    if upright:
        width, height, pixels_HWC = height, width, pixels_HWC.swapaxes(0, 1)
    assert pixels_HWC.shape == (side, side, 3)
    reach = 3 * max(1, math.ceil(side / min(width, height)))  # Lanczos rings so far around an edge
    for start, end, colour in ((0, 16, RED), (16, 48, GREEN), (48, 64, BLUE)):
        inner = pixels_HWC[:, start + reach * (start > 0) : end - reach * (end < side)]
        assert np.array_equal(inner, np.broadcast_to(np.uint8(colour), inner.shape))
    cropped = f"cropped from {width} x {height} to 64 x 64"
    resized = f"resized from {width} x {height} and cropped to 64 x 64"
    assert note == (cropped if side in (width, height) else resized)


def test_fit_leaves_image_of_right_size_unchanged():
    image = noise(64, 64)
    pixels_HWC, note = fit(image, 64)
    assert note is None
    assert pixels_HWC.dtype == np.uint8
    assert np.array_equal(pixels_HWC, np.asarray(image))
    pixels_HWC[:] = 0  # the caller's own
    assert np.array_equal(np.asarray(image), np.asarray(noise(64, 64)))


@pytest.mark.parametrize(("size", "left", "top"), [((65, 64), 0, 0), ((67, 64), 1, 0), ((64, 80), 0, 8)])
def test_fit_crops_without_resampling(size, left, top):
    image = noise(*size)
    pixels_HWC, _ = fit(image, 64)
    assert np.array_equal(pixels_HWC, np.asarray(image)[top : top + 64, left : left + 64])


def test_fit_only_resizes_square():
    assert fit(noise(128, 128), 64)[1] == "resized from 128 x 128 to 64 x 64"
    assert fit(noise(1, 1), 64)[1] == "resized from 1 x 1 to 64 x 64"


def test_fit_equals_resize_and_crop():
    image = noise(150, 100)
    whole = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(fit(image, 64)[0], whole[:, 16:80])


def test_fit_approximates_large_reduction():
    image = noise(40, 40).resize((1000, 1000), Image.Resampling.BICUBIC)
    exact = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(fit(image, 16)[0] - exact).max() <= 4  # of 255


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 3)])
def test_fit_bounds_memory_for_extreme_shapes(monkeypatch, size):
    made = []
    resize = Image.Image.resize

    def watched(self, *arguments, **options):
        image = resize(self, *arguments, **options)
        made.append(image.size)
        return image

    monkeypatch.setattr(Image.Image, "resize", watched)
    pixels_HWC, note = fit(Image.new("RGB", size, BLUE), 64)
    assert made == [(64, 64)]
    assert np.array_equal(pixels_HWC, np.full((64, 64, 3), BLUE))
    assert note == f"resized from {size[0]} x {size[1]} and cropped to 64 x 64"


@pytest.mark.parametrize(
    ("mode", "white"), [("RGBA", (1, 2, 3, 0)), ("I;16", 65535), ("I;16B", 65535), ("YCbCr", (255, 128, 128)), ("1", 1)]
)
def test_fit_takes_any_mode(mode, white):
    assert np.array_equal(fit(Image.new(mode, (9, 8), white), 4)[0], np.full((4, 4, 3), 255))


def test_read_image_refuses_a_large_webp_file(tmp_path, save_image):
    """Pillow holds the whole file: one with a hole of a gigabyte took two."""
    save_image(tmp_path / "a.webp")
    with (tmp_path / "a.webp").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match=r"a\.webp has 1,073,741,824 bytes; at most 200,000,000 are read"):
        read_image(tmp_path / "a.webp")


def test_read_image_refuses_more_transparent_colours_than_a_palette_has(tmp_path):
    """Pillow loads such a PNG, and fails when it is converted."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).quantize(4).save(file, "PNG")
    before, mark, rest = file.getvalue().partition(b"IDAT")
    chunk = b"tRNS" + b"\xff" * 301
    chunk = struct.pack(">I", 301) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(before[:-4] + chunk + before[-4:] + mark + rest)
    with pytest.raises(InputError, match=r"a\.png is cut off or damaged: palette index out of range"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_read_image_reads_each_format_from_bytes(form):
    """Every WebP file in an archive was refused as damaged: its bytes have no file descriptor."""
    content = io.BytesIO()
    Image.new("RGB", (24, 16), RED).save(content, form)
    image = read_image(Path("shard.tar/a"), content=content.getvalue())
    assert image.size == (24, 16)
    assert np.abs(np.asarray(image, dtype=int) - RED).max() < 16
