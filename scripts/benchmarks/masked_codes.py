"""Print the loss of held-out images when every code is masked, so that text and position predict it.

    cogview scenes scripts/recipes/emoji-cpu.yaml && python scripts/benchmarks/masked_codes.py WORLD MODEL…

For each model (a checkpoint folder or a name) and kind of scene, nats per code. For scenes with two objects also the
share whose true codes are likelier than the codes of the scene with its two objects exchanged.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import arguments
import numpy as np
import torch

from cogview.checkpoints.checkpoint import Model
from cogview.device import flush_denormals
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.pipeline.cogview import CogView
from cogview.vqvae.codec import to_float


def codes_of(model: Model, world: EmojiWorld, scene: Scene) -> np.ndarray:
    """Return the codes of the image of a scene, (G * G,)."""
    pixels = to_float(world.render(scene))[None]
    return model.image_tokenizer.encode(pixels).flatten().numpy()


def masked_log_probabilities(model: Model, caption: str) -> np.ndarray:
    """Return log p of every code at every position, (G * G, codes), given the caption only."""
    vocabulary, num_codes = model.config.vocabulary, model.config.grid**2
    row = model.config.layouts["generate"].arrange(
        vocabulary, text=model.text_tokenizer.encode(caption), image=np.zeros(num_codes, dtype=np.int64)
    )
    image = row.spans["image"]
    ids = row.ids.copy()
    ids[image] = vocabulary.command("[MASK]")
    hidden = model.transformer.hidden(torch.from_numpy(ids)[None], torch.from_numpy(row.positions)[None])
    predicted_at = slice(image.start - 1, image.stop - 1)
    return model.transformer.head(hidden[0, predicted_at], vocabulary.image).log_softmax(dim=-1).numpy()


@torch.inference_mode()
def main() -> int:
    """Print a line for each model."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("world", type=arguments.folder, help="folder of a world, written by cogview scenes")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names or folders")
    parser.add_argument("-n", type=arguments.count, default=200, help="held-out scenes (default: 200)")
    args = parser.parse_args()
    flush_denormals()
    world = EmojiWorld.load(args.world)
    held_out = held_out_scenes(world, args.n, seed=11)
    for name in args.models:
        model = CogView.from_pretrained(name, device="cpu").model
        losses: dict[str, list[float]] = defaultdict(list)
        bound = []
        for scene, caption in held_out:
            logs = masked_log_probabilities(model, caption)
            positions = np.arange(len(logs))
            true = logs[positions, codes_of(model, world, scene)]
            losses[scene.kind].append(float(-true.mean()))
            if len(scene.things) == 2:
                swapped = codes_of(model, world, replace(scene, things=scene.things[::-1]))
                bound.append(true.sum() > logs[positions, swapped].sum())
        kinds = ", ".join(f"{kind} {np.mean(values):.2f}" for kind, values in sorted(losses.items()))
        print(f"{name}: {kinds} nats per code; right positions {np.mean(bound):.0%} of {len(bound)}", flush=True)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
