"""Generate N images of a prompt, rank them by how well prompt and image fit, and save the best K.

python examples/rerank_best_of_n.py 左边是狐狸，右边是苹果 -n 16 --keep 4 -o outputs
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cogview import CogView, InputError, Sampling


def save_best(prompt: str, n: int, keep: int, folder: Path) -> None:
    """Generate, rank and save."""
    model = CogView.from_pretrained("cogview-emoji")
    varied = Sampling(temperature=1.5, top_k=0)  # noisier than the model's default, so that ranking has work to do
    folder.mkdir(parents=True, exist_ok=True)
    for rank, image in enumerate(model.generate(prompt, n=n, keep=keep, seed=0, sampling=varied), start=1):
        path = folder / f"best{rank}.png"
        image.save(path)
        assert image.score is not None
        print(f"{path}: candidate {image.index}, score {image.score.log_probability:.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Generate, rank and save; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("-n", type=int, default=16, help="images to generate (default: 16)")
    parser.add_argument("--keep", type=int, default=4, help="images to save (default: 4)")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs"), help="folder (default: outputs)")
    args = parser.parse_args(argv)
    try:
        save_best(args.prompt, args.n, args.keep, args.output)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
