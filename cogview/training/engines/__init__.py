"""Engines compute gradients and update weights: plain torch, and DeepSpeed."""

from __future__ import annotations

from cogview.training.distributed import DistributedContext
from cogview.training.engines.base import Engine, TransformerWithLoss
from cogview.training.settings import EngineSettings, TransformerTraining


def open_engine(
    model: TransformerWithLoss,
    training: TransformerTraining,
    settings: EngineSettings,
    context: DistributedContext,
    num_threads: int | None = None,
) -> Engine:
    """Return the engine that ``settings`` name, with the model on the device of ``context``.

    Args:
        model: The transformer and its loss. The engine trains the parameters that require gradients.
        training: Settings of the optimizer.
        settings: The engine and its options.
        context: The processes that train together. DeepSpeed needs a process group, even for one process.
        num_threads: Threads of the torch engine that compute shards of a batch; None lets it choose.

    Raises:
        InputError: DeepSpeed is missing, or cannot compute in the dtype of ``model`` on this device.
    """
    if settings.checkpointing != "auto":
        model.transformer.checkpointing = settings.checkpointing
    if settings.name == "deepspeed":
        from cogview.training.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, training, settings, context)
    from cogview.training.engines.torch_engine import TorchEngine

    model.transformer.to(context.device)
    return TorchEngine(model, training, settings, context, num_threads)
