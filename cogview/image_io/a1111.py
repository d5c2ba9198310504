"""The text chunk ``parameters`` of AUTOMATIC1111's web UI, which many viewers of images show."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

A1111_KEY = "parameters"

_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_MIN_SETTINGS = 3  # of a line of settings; with fewer it belongs to the prompt
_SAMPLING_NAMES = {
    "temperature": "Temperature",
    "top_k": "Top k",
    "top_p": "Top p",
    "min_p": "Min p",
    "text_attention": "Text attention",
    "noise_version": "Noise version",
}


def a1111_parameters(metadata: Mapping[str, str], size: tuple[int, int]) -> str:
    """Return the prompt and a line of settings, such as "Steps: 64, Sampler: cogview, CFG scale: 1.0, Seed: 7, …".

    Args:
        metadata: Text chunks of a generated image; ``codes`` has a step for each code.
        size: Width and height in pixels.
    """
    settings = {
        "Steps": str(len(metadata["codes"].split())),
        "Sampler": "cogview",
        "CFG scale": metadata.get("guidance", "1.0"),
        "Seed": metadata["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model": metadata.get("model", ""),
        **{name: metadata[key] for key, name in _SAMPLING_NAMES.items() if key in metadata},
        "Version": f"cogview {metadata.get('cogview', '')}".strip(),
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value)
    negative = f"{_NEGATIVE} {metadata['negative']}\n" if "negative" in metadata else ""
    return f"{metadata.get('prompt', '')}\n{negative}{line}"


def parse_a1111(text: str) -> dict[str, str]:
    """Return the content of a chunk ``parameters``.

    Args:
        text: The prompt on one or more lines, then the negative prompt if there is one, then a line of settings.

    Returns:
        ``prompt``, ``negative prompt`` if there is one, and the settings by their names in lower case.
    """
    *lines, last = text.strip().split("\n")
    settings = _SETTING.findall(last)
    if len(settings) < _MIN_SETTINGS:
        lines, settings = [*lines, last], []
    prompt, _, negative = "\n".join(lines).partition(_NEGATIVE)
    parsed = {"prompt": prompt.strip()}
    if negative:
        parsed["negative prompt"] = negative.strip()
    return parsed | {name.strip().lower(): _unquoted(value) for name, value in settings}


def _quoted(value: str) -> str:
    """Return a value in quotation marks if it has characters that divide the line."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    """Return a value without its quotation marks."""
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value.strip()
