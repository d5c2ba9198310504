"""Print the validation losses of each task of a model, with codes given and with codes masked.

    python scripts/benchmarks/validation_losses.py WORK/held-out-store CHECKPOINT…

For each model (a checkpoint folder or a name), nats per code or piece. "Given": every code is predicted after the true
codes before it, as in generation. "Hidden": from the text, the small image and the position only.
"""

from __future__ import annotations

import arguments
import torch

from cogview.data.store import TokenStore
from cogview.device import flush_denormals
from cogview.pipeline.cogview import CogView
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.trainer import TransformerTrainer


def main() -> int:
    """Print a line for each model, task and setting."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("store", type=arguments.folder, help="store of held-out scenes, written by cogview encode")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names or folders")
    parser.add_argument("-n", type=arguments.count, default=192, help="rows (default: 192)")
    args = parser.parse_args()
    flush_denormals()
    store = TokenStore(args.store)
    for name in args.models:
        model = CogView.from_pretrained(name, device="cpu").model
        settings = TransformerTraining(
            steps=2, warmup_steps=1, batch_size=24, name_loss_weight=1.0, tasks=dict.fromkeys(model.config.tasks, 1.0)
        )
        engine = open_engine(
            TransformerWithLoss(model.transformer, None),
            settings,
            EngineSettings(),
            DistributedContext(torch.device("cpu")),
        )
        trainer = TransformerTrainer(model, settings, engine)
        trainer.transformer.eval()
        for task in model.config.tasks:
            for hidden in (False, True) if task != "caption" else (False,):
                found = trainer.store_losses(store, task, args.n, mask_all=hidden)
                losses = ", ".join(f"{metric} {loss:.3f}" for metric, loss in found.items() if metric != "loss")
                print(f"{name}: {'hidden' if hidden else 'given'}: {losses}", flush=True)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
