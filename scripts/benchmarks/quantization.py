"""Measure the cost of quantization: the embedded model in int8 and int4 against float32 and bfloat16.

    python scripts/benchmarks/quantization.py WORLD [-n 500]

For each dtype: KL(q || p) in nats, averaged over the codes of held-out scenes, where q is the distribution of the next
code given the true codes before it, in float32 or in bfloat16; the share of codes whose most probable code equals that
of bfloat16; and the share of held-out captions whose generated image is right in everything, with its 95% interval.
"""

from __future__ import annotations

import arguments
import numpy as np
import torch

from cogview.emoji.evaluation.scenes import check_world, held_out_scenes, summarize_images
from cogview.emoji.grader import SceneGrader
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.harness import generate_images
from cogview.evaluation.metrics import format_accuracy
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.batching import pad_right
from cogview.vqvae.codec import to_float

DTYPES = ("float32", "bfloat16", "int8", "int4")


@torch.inference_mode()
def code_log_probs(model: CogView, captions: list[str], codes: np.ndarray, batch_size: int = 50) -> torch.Tensor:
    """Return log p of every code at every position: float32 (rows, G * G, 8192)."""
    layout, vocabulary = model.config.layouts["generate"], model.vocabulary
    rows = [
        layout.arrange(vocabulary, text=model.text_tokenizer.encode(caption), image=own)
        for caption, own in zip(captions, codes, strict=True)
    ]
    parts = []
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        batch = pad_right(chunk, vocabulary.pad)
        hidden = model.transformer.hidden(torch.from_numpy(batch.ids), torch.from_numpy(batch.positions))
        spans = [row.spans["image"] for row in chunk]
        before = torch.stack([hidden[i, span.start - 1 : span.stop - 1] for i, span in enumerate(spans)])
        parts.append(model.transformer.head(before, vocabulary.image).log_softmax(dim=-1))
    return torch.cat(parts)


def main() -> int:
    """Print a Markdown table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("world", type=arguments.folder, help="world of the emoji-cpu recipe, written by cogview scenes")
    parser.add_argument("--model", default="cogview-emoji", help="(default: cogview-emoji)")
    parser.add_argument("-n", type=arguments.count, default=500, help="captions to generate images for (default: 500)")
    parser.add_argument(
        "--rows", type=arguments.count, default=100, help="scenes whose codes are predicted (default: 100)"
    )
    args = parser.parse_args()
    world = EmojiWorld.load(args.world)
    held_out = held_out_scenes(world, max(args.n, args.rows))
    scenes, captions = [scene for scene, _ in held_out], [caption for _, caption in held_out]
    grader = SceneGrader(world)
    codes = None
    known: dict[str, torch.Tensor] = {}
    print("| weights | KL to float32 | KL to bfloat16 | most probable code as in bfloat16 | everything right |")
    print("|---|---|---|---|---|", flush=True)
    for dtype in DTYPES:
        model = CogView.from_pretrained(args.model, device="cpu", dtype=dtype)
        if codes is None:
            check_world(model, world)
            true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes[: args.rows])])
            codes = model.image_tokenizer.encode(to_float(true)).numpy()
        known[dtype] = log_p = code_log_probs(model, captions[: args.rows], codes)
        cells = ["", "", ""]
        for cell, name in enumerate(("float32", "bfloat16")):
            if name in known:
                q = known[name]
                cells[cell] = f"{(q.exp() * (q - log_p)).sum(dim=-1).mean().item():.5f}"
                cells[2] = f"{(q.argmax(dim=-1) == log_p.argmax(dim=-1)).float().mean().item():.2%}"
        if dtype == "float32":
            cells[2] = ""
        sampling = model.config.sampling
        images = generate_images(model, captions[: args.n], 0, sampling, 50, f"generating in {dtype}")
        grades = summarize_images([grader.grade(image, scene) for image, scene in zip(images, scenes, strict=False)])
        print(f"| {dtype} | {' | '.join(cells)} | {format_accuracy(grades['everything'])} |", flush=True)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
