"""Adapters by name, each with a scale, as in ``style:0.5``. Only the standard library is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from cogview.errors import InputError
from cogview.formatting import shorten

MAX_SCALE = 100.0


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter and the scale of its changes.

    Attributes:
        name: Its folder, or owner/name on the Hugging Face Hub.
        scale: Factor of its changes: 1 as trained, 0 off, below 0 the opposite.

    Raises:
        InputError: The name is empty, or the scale is not from -``MAX_SCALE`` to ``MAX_SCALE``.
    """

    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("the name of the adapter is empty; expected NAME or NAME:SCALE")
        if not abs(self.scale) <= MAX_SCALE:  # NaN compares as false
            raise InputError(
                f"the scale of an adapter must be from -{MAX_SCALE:g} to {MAX_SCALE:g}, got {self.scale:g} for "
                f"{shorten(self.name, 80)}"
            )

    @classmethod
    def parse(cls, text: str) -> AdapterChoice:
        r"""Return the adapter that ``NAME`` or ``NAME:SCALE`` names; raise InputError for a scale out of range.

        What follows the last colon is a scale if it is a number, and part of the name otherwise, as in ``C:\style``.
        """
        name, colon, number = text.rpartition(":")
        if not colon:
            return cls(text)
        try:
            scale = float(number)
        except ValueError:
            return cls(text)
        return cls(name, scale)

    def __str__(self) -> str:
        """Return the text that ``parse`` reads: the name alone at scale 1."""
        text = f"{self.name}:{repr(self.scale).removesuffix('.0')}"
        return text if self.scale != 1 or AdapterChoice.parse(self.name).name != self.name else self.name
