"""``cogview info IMAGE.png``: the metadata of an image, and the command that generates it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from cogview.errors import InputError
from cogview.formatting import printable

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SHOWN = 500  # characters of a text in a chunk that is not of CogView


def is_png(path: Path) -> bool:
    """Return whether a path is a regular file with the signature of PNG."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def describe_png(path: Path) -> dict[str, str]:
    """Return the facts of a PNG file by name: prompt, seed, settings and, of an image of CogView, a command.

    Raises:
        InputError: The file or one of its chunks is damaged.
    """
    from cogview.image_io.a1111 import A1111_KEY, parse_a1111
    from cogview.image_io.reading import open_image

    try:
        with open_image(path, ("PNG",)) as image:
            size = f"{image.width} x {image.height} pixels"
            texts = {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on broken data
        raise InputError(f"{path} is cut off or damaged: {' '.join(str(error).split())}") from None
    if "cogview" in texts and "seed" in texts:
        made_by = f"cogview {texts.pop('cogview')}"
        hidden = ("codes", A1111_KEY)
        facts = {key.replace("_", " "): text for key, text in texts.items() if key not in hidden}
        command = {"command": repeat_command(texts)}
    elif A1111_KEY in texts:
        facts, made_by, command = parse_a1111(texts[A1111_KEY]), "another program, with A1111's metadata", {}
    else:
        facts, made_by, command = texts, "unknown", {}
    shown = {key: text[:MAX_SHOWN] + "…" * (len(text) > MAX_SHOWN) for key, text in facts.items()}
    described = {"image": str(path), "size": size, "made by": made_by, **shown, **command}
    return {printable(key): printable(value.replace("\n", " ⏎ ")) for key, value in described.items()}


def repeat_command(texts: Mapping[str, str]) -> str:
    """Return the command that generates an image again, from its text chunks.

    Of a model that was given as a folder the chunks have the name alone, and of a given image that of its file.
    """
    from cogview.image_io.png import DEFAULTS_OF_OLD_FILES, SAMPLING_KEYS, safe_name

    task, index, source = texts.get("task", "generate"), int(texts.get("index", "0")), texts.get("source", "IMAGE")
    prompt = texts.get("prompt", "")
    if "codes_sha256" in texts:  # a contact sheet
        words = ["generate", *prompt.split("\n"), "--grid"]
    elif task == "upscale" and source.startswith(f"{safe_name(prompt)}-seed{texts['seed']}-{index}"):
        words = ["generate", prompt, "-n", str(index + 1), "--upscale"]
    elif task == "upscale":
        words = ["upscale", source, "--prompt", prompt]
    elif task == "complete":
        words = ["complete", source, "--rows", texts.get("rows", "0"), "--prompt", prompt, "-n", str(index + 1)]
    else:
        words = ["generate", prompt, "-n", str(index + 1)]
    words += ["--seed", texts["seed"]]
    settings = {**DEFAULTS_OF_OLD_FILES, **texts} if "temperature" in texts else texts
    for key in SAMPLING_KEYS:
        if key in settings:
            words += [f"--{key.replace('_', '-')}", settings[key]]
    model, _, adapter = texts.get("model", "").partition(" + ")
    for option, label in (("--model", model), ("--adapter", adapter)):
        if label:
            words += [option, label.partition(" (")[0]]
    return "cogview " + " ".join(map(shlex.quote, words))
