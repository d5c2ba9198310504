"""CogView: an autoregressive transformer that generates images from Chinese text, captions, upscales and ranks them.

The names of ``__all__`` are the public interface. They are imported when they are first used: torch takes seconds.
``help(cogview.CogView)`` describes every method.

Examples:
    >>> from cogview import CogView
    >>> model = CogView.from_pretrained("cogview-emoji")
    >>> images = model.generate("一个红苹果", n=4, seed=7)
    >>> images[0].save("apple.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview.errors import InputError as InputError
    from cogview.generation.requests import DecodingStopped as DecodingStopped
    from cogview.modeling.config import Sampling as Sampling
    from cogview.pipeline.cogview import CogView as CogView
    from cogview.pipeline.requests import GenerationRequest as GenerationRequest
    from cogview.pipeline.results import Caption as Caption
    from cogview.pipeline.results import GeneratedImage as GeneratedImage
    from cogview.pipeline.results import GenerationProgress as GenerationProgress
    from cogview.pipeline.results import Score as Score
    from cogview.tokenizers.tasks import Task as Task
    from cogview.tokenizers.tasks import register_task as register_task

__version__ = "0.3.0.dev0"
__all__ = [
    "Caption",
    "CogView",
    "DecodingStopped",
    "GeneratedImage",
    "GenerationProgress",
    "GenerationRequest",
    "InputError",
    "Sampling",
    "Score",
    "Task",
    "register_task",
]

_MODULES = {
    "Caption": "cogview.pipeline.results",
    "CogView": "cogview.pipeline.cogview",
    "DecodingStopped": "cogview.generation.requests",
    "GeneratedImage": "cogview.pipeline.results",
    "GenerationProgress": "cogview.pipeline.results",
    "GenerationRequest": "cogview.pipeline.requests",
    "InputError": "cogview.errors",
    "Sampling": "cogview.modeling.config",
    "Score": "cogview.pipeline.results",
    "Task": "cogview.tokenizers.tasks",
    "register_task": "cogview.tokenizers.tasks",
}


def __getattr__(name: str) -> Any:
    """Return a public name, imported now."""
    if name not in _MODULES:
        raise AttributeError(f"module 'cogview' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]
