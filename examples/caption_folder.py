"""Caption every image below a folder; print one JSON object per image.

python examples/caption_folder.py pictures > captions.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cogview import CogView

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main(argv: Sequence[str] | None = None) -> int:
    """Caption the images; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)

    model = CogView.from_pretrained("cogview-emoji")
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    images = [Image.open(path) for path in paths]
    for path, captions in zip(paths, model.caption(images), strict=True):
        best = captions[0]
        line = {"file": str(path), "caption": best.text, "log_probability": round(best.log_probability, 3)}
        print(json.dumps(line, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
