"""Measure how fast a small transformer learns the positions of two objects from captions of pairs.

    cogview scenes scripts/recipes/emoji-cpu.yaml && python scripts/benchmarks/binding.py WORLD [options]

The model reads a caption and then predicts, at four masked positions in each of the two cells, which of 40 objects is
there. An accuracy of one half means that it has read the objects and guesses their positions. It is printed every tenth
of the run, on 1,000 other captions: for those whose words of position precede both names (左边是狐狸，右边是苹果),
and for all others (狐狸在苹果的左边).
"""

from __future__ import annotations

import re
import time
from dataclasses import replace

import arguments
import numpy as np
import torch
from torch.nn import functional as F

from cogview.device import flush_denormals
from cogview.emoji.scene import SceneWeights
from cogview.emoji.world import EmojiWorld
from cogview.modeling.config import TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer

THINGS, TESTED, LONGEST = 40, 1000, 24
PLAIN = re.compile(r".*(左边|右边|上面|下面)[是有].*[,，].*(左边|右边|上面|下面)[是有]")
# Codes of an 8 x 8 image in the left and right cell, and in the upper and lower one.
CELLS = {"beside": (16, 17, 24, 35, 20, 21, 30, 38), "above": (2, 3, 11, 27, 34, 36, 43, 59)}


def main() -> int:
    """Train once and print a line of accuracies."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("world", type=arguments.folder, help="folder of a world, written by cogview scenes")
    parser.add_argument("--sinusoidal", action="store_true", help="initialize positions as sinusoids")
    parser.add_argument(
        "--plain-first", type=arguments.fraction, default=0.0, help="share of the run with plain captions only"
    )
    parser.add_argument(
        "--captions", type=arguments.count, default=60_000, help="captions to train on (default: 60,000)"
    )
    parser.add_argument("--batch-size", type=arguments.count, default=12, help="(default: 12)")
    parser.add_argument("--learning-rate", type=arguments.positive, default=1e-3, help="(default: 0.001)")
    parser.add_argument("--width", type=arguments.count, default=128, help="(default: 128)")
    parser.add_argument("--layers", type=arguments.count, default=3, help="(default: 3)")
    args = parser.parse_args()
    flush_denormals()
    torch.manual_seed(0)

    world = EmojiWorld.load(args.world)
    world = EmojiWorld(replace(world.settings, things=THINGS), world.candidates, world.sprites, world.colours)
    pairs = SceneWeights(one=0, many=0, pair=1)
    scenes = [world.sample_scene(5, number, weights=pairs) for number in range(args.captions + TESTED)]
    captions = [world.caption(scene, number) for number, scene in enumerate(scenes)]
    plain = np.array([PLAIN.match(caption) is not None for caption in captions])
    names = [name for thing in world.things for name in thing.names]
    tokenizer = TextTokenizer(
        train_text_tokenizer(captions[:5000], size=2000, coverage=1.0, max_piece_length=1, words=names)
    )
    number_of = {thing.emoji: number for number, thing in enumerate(world.things)}
    things = torch.tensor([[number_of[thing.emoji] for thing in scene.things] for scene in scenes])
    cells = torch.tensor([CELLS[scene.kind] for scene in scenes])
    texts = torch.zeros(len(captions), LONGEST, dtype=torch.int64)
    for row, caption in enumerate(captions):
        pieces = tokenizer.encode(caption)
        texts[row, : len(pieces)] = torch.tensor(pieces)

    # Ids: pieces, then objects, then the mask of a code and the end of a caption.
    answers = range(tokenizer.size, tokenizer.size + THINGS)
    hidden, end = answers.stop, answers.stop + 1
    model = Transformer(
        TransformerConfig(
            num_layers=args.layers,
            width=args.width,
            num_heads=args.width // 32,
            vocabulary_size=end + 1,
            max_positions=LONGEST + 2 + 64,
            dropout=0.0,
            branch_norm_init=0.05,
            sinusoidal_positions=args.sinusoidal,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.04)

    def logits(rows: np.ndarray) -> torch.Tensor:
        """Return logits (rows, 8, objects)."""
        count = len(rows)
        ids = torch.cat([texts[rows], torch.full((count, 1), end), torch.full((count, 8), hidden)], dim=1)
        before = torch.arange(LONGEST + 1).expand(count, -1)
        positions = torch.cat([before, LONGEST + 1 + cells[rows]], dim=1)
        return model.head(model.hidden(ids, positions)[:, -8:], answers)

    steps = args.captions // args.batch_size
    tested = np.arange(args.captions, args.captions + TESTED)
    plain_rows = np.flatnonzero(plain[: args.captions])
    start = time.perf_counter()
    for step in range(steps):
        pool = plain_rows if step < args.plain_first * steps else np.arange(args.captions)
        rows = pool[np.arange(step * args.batch_size, (step + 1) * args.batch_size) % len(pool)]
        loss = F.cross_entropy(logits(rows).flatten(0, 1), things[rows].repeat_interleave(4, dim=1).flatten())
        rate = args.learning_rate * min(1, (step + 1) / 100) * (1 + np.cos(np.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (steps // 10) == 0:
            with torch.no_grad():
                right = logits(tested).argmax(dim=-1) == things[tested].repeat_interleave(4, dim=1)
            shares = [right[chosen].float().mean().item() for chosen in (plain[tested], ~plain[tested])]
            elapsed = time.perf_counter() - start
            print(
                f"{(step + 1) * args.batch_size:7} captions, {elapsed:4.0f} s: right where plain {shares[0]:.0%}, "
                f"elsewhere {shares[1]:.0%}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
