"""Generate images of a prompt and print how each was made.

python examples/generate_images.py 一个红苹果 -n 4 --seed 7 -o outputs
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cogview import CogView, InputError


def generate(prompt: str, n: int, seed: int, folder: Path) -> None:
    """Generate the images and save them in a folder."""
    model = CogView.from_pretrained("cogview-emoji")
    folder.mkdir(parents=True, exist_ok=True)
    for image in model.generate(prompt, n=n, seed=seed):
        path = folder / f"seed{image.seed}-{image.index}.png"
        image.save(path)
        print(f"{path}: {image.codes.size} codes, log p = {image.log_probability:.1f} nats")


def main(argv: Sequence[str] | None = None) -> int:
    """Generate the images; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("-n", type=int, default=4, help="number of images (default: 4)")
    parser.add_argument("--seed", type=int, default=7, help="(default: 7)")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs"), help="folder (default: outputs)")
    args = parser.parse_args(argv)
    try:
        generate(args.prompt, args.n, args.seed, args.output)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
