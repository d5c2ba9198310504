"""CogView: one transformer that draws pictures from Chinese text, captions, enlarges and ranks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview.pipeline.cogview import CogView as CogView

__version__ = "0.1.0"
__all__ = ["CogView"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, so it comes with the first use and not with the package.
    if name == "CogView":
        from cogview.pipeline.cogview import CogView

        return CogView
    raise AttributeError(f"module 'cogview' has no attribute {name!r}")
