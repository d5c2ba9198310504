"""Caption every image below a folder; print one JSON object per image.

python examples/caption_folder.py pictures > captions.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cogview import CogView, InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def caption_folder(folder: Path) -> None:
    """Print a caption of every image below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"there is no image below {folder}: expected names in {', '.join(SUFFIXES)}")
    model = CogView.from_pretrained("cogview-emoji")
    for path, captions in zip(paths, model.caption(paths), strict=True):
        best = captions[0]
        line = {"file": str(path), "caption": best.text, "log_probability": round(best.log_probability, 3)}
        print(json.dumps(line, ensure_ascii=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Caption the images; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    try:
        caption_folder(args.folder)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
