"""``cogview info IMAGE.png``: the metadata of an image, and the command that generates it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogview.errors import InputError
from cogview.formatting import printable
from cogview.plain_data import parse_json

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NO_COMMAND = "none: it was upscaled within a job, which has to be run again"
ADAPTER_FOLDER = re.compile(r"(.*) \([0-9a-f]{12}\)(?::(.*))?")  # name, hash and scale
EDIT_OPTIONS = {"edit": ("mask", "strength"), "fill": ("mask",), "vary": ("keep",)}  # by task
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
        hidden = ("codes", "mask_codes", A1111_KEY)
        facts = {key.replace("_", " "): text for key, text in texts.items() if key not in hidden}
        try:
            command = {"command": repeat_command(texts) or NO_COMMAND}
        except ValueError as error:
            command = {"command": f"none: a text chunk is damaged: {error}"}
    elif A1111_KEY in texts:
        facts, made_by, command = parse_a1111(texts[A1111_KEY]), "another program, with A1111's metadata", {}
    else:
        facts, made_by, command = texts, "unknown", {}
    shown = {key: text[:MAX_SHOWN] + "…" * (len(text) > MAX_SHOWN) for key, text in facts.items()}
    described = {"image": str(path), "size": size, "made by": made_by, **shown, **command}
    return {printable(key): printable(value.replace("\n", " ⏎ ")) for key, value in described.items()}


def repeat_command(texts: Mapping[str, str]) -> str | None:
    """Return the command that generates an image again, from its text chunks; None if there is none.

    Of a model that was given as a folder the chunks have the name alone, and of a given image that of its file.
    """
    from cogview.image_io.png import DEFAULTS_OF_OLD_FILES, PRECISION_KEYS, SAMPLING_KEYS

    words, prompts = _sheet_words(texts) if "codes_sha256" in texts else _image_words(texts)
    if not words:
        return None
    words = [*words, "--seed", str(int(texts["seed"]))]
    if "negative" in texts:
        words += ["--negative", texts["negative"]]
    is_complete = "temperature" in texts and texts.get("task") != "job"  # others leave settings to the model
    settings = {**DEFAULTS_OF_OLD_FILES, **texts} if is_complete else texts
    # Where the small image had another setting, both are those of the model: an option would set both.
    small = _parse(texts.get("source_sampling", "{}"), dict)
    for key in (*SAMPLING_KEYS, *PRECISION_KEYS):
        if key in settings and str(small.get(key, settings[key])) == settings[key]:
            words += [f"--{key.replace('_', '-')}", settings[key]]
    model, *adapters = texts.get("model", "").split(" + ")
    if model:
        words += ["--model", model.partition(" (")[0]]
    for adapter in adapters:
        words += ["--adapter", _adapter_word(adapter)]
    if any(prompt.startswith("-") for prompt in prompts):
        words += ["--", *prompts]
    else:
        words[1:1] = prompts
    return "cogview " + " ".join(map(_shell_word, words))


def _adapter_word(label: str) -> str:
    """Return an adapter as ``--adapter`` takes it: a folder by its name alone, with the scale unless it is 1."""
    from cogview.checkpoints.adapter_choice import AdapterChoice

    found = ADAPTER_FOLDER.fullmatch(label)
    return label if found is None else str(AdapterChoice(found[1], float(found[2] or 1)))


def _image_words(texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the command of an image with its number, and the arguments that stand before its options."""
    from cogview.image_io.png import safe_name

    prompt, index, task = texts.get("prompt", ""), int(texts.get("index", "0")), texts.get("task", "generate")
    source, count = texts.get("source", "IMAGE"), ["-n", str(index + 1)]
    if task == "generate":
        return ["generate", *count], [prompt]
    if task == "complete":
        return ["complete", "--rows", texts.get("rows", "0"), "--prompt", prompt, *count], [source]
    if task in EDIT_OPTIONS:
        return _edit_words(texts, count, [source])
    # Files of versions before 0.3 do not name the task of the small image.
    is_own = source.startswith(f"{safe_name(prompt)}-seed{texts['seed']}-{index}")
    if texts.get("source_task", "generate" if is_own else None) == "generate":
        return ["generate", *count, "--upscale"], [prompt]
    if "source_task" in texts or index:
        return [], []
    flags = ["--low-level"] * (task == "low_level") + ["--tiles"] * ("tiles" in texts)
    return ["upscale", *flags, "--prompt", prompt], [source]


def _edit_words(texts: Mapping[str, str], options: list[str], sources: list[str]) -> tuple[list[str], list[str]]:
    """Return the command of an edited, filled or varied image, and the arguments that stand before its options."""
    task, prompt = texts["task"], texts.get("prompt", "")
    given = [word for key in EDIT_OPTIONS[task] if key in texts for word in (f"--{key}", texts[key])]
    if task == "fill":
        return ["complete", *given, "--prompt", prompt, *options], sources
    return [task, *given, *options], [*sources, prompt] if task == "edit" else sources


def _sheet_words(texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the command of a contact sheet, and the arguments that stand before its options."""
    prompt, source = texts.get("prompt", ""), texts.get("source", "")
    names = {"n": "-n", "keep": "--keep", "rank_by": "--rank-by"}
    options = [word for key, name in names.items() if key in texts for word in (name, texts[key])]
    options.append("--grid")
    if texts.get("task") == "complete":
        return ["complete", "--rows", texts.get("rows", "0"), "--prompt", prompt, *options], source.split("\n")
    if texts.get("task") in EDIT_OPTIONS:
        return _edit_words(texts, options, source.split("\n"))
    if texts.get("task") == "job":
        return ["generate", "--input", source, *options], []
    prompts = _parse(texts["prompts"], list) if "prompts" in texts else prompt.split("\n")
    return ["generate", *options], list(map(str, prompts))


def _parse(text: str, kind: type[Any]) -> Any:
    """Return the list or mapping that a text chunk holds as JSON; ValueError if it does not."""
    value = parse_json(text)
    if not isinstance(value, kind):
        raise ValueError(f"{text[:MAX_SHOWN]} is no {kind.__name__}")
    return value


def _shell_word(word: str) -> str:
    """Return a word as a shell reads it, on one line; bash, zsh and ksh read the bytes of ``$'…'`` in octal."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(
        one if one.isprintable() and one not in "'\\" else "".join(f"\\{byte:03o}" for byte in one.encode())
        for one in word
    )
    return f"$'{escaped}'"
