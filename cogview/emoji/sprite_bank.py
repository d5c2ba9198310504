"""Sprites of one size as matrices, which find the best one for many squares of an image at once."""

# N sprites, S side of a sprite in pixels, D = S * S * 3 values of a square, P squares, B backgrounds
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np


class SpriteBank:
    """Sprites at one size, and backgrounds that they are composed with.

    Composed with a background b, a sprite changes it by p = colour - alpha * b. It lowers the squared error of a
    residual r (image minus background) by its gain 2 r.p - p.p.

    Args:
        colour: float32 (N, S, S, 3), premultiplied by the alpha, in [0, 255].
        alpha: float32 (N, S, S, 1) in [0, 1].
        backgrounds: float32 (B, S, S, 3) in [0, 255].
    """

    def __init__(self, colour: np.ndarray, alpha: np.ndarray, backgrounds: np.ndarray) -> None:
        self.side = colour.shape[1]
        self._colour = colour.reshape(len(colour), -1)
        self._alpha = alpha.reshape(len(alpha), -1)
        self._backgrounds = backgrounds.reshape(len(backgrounds), -1, 3)
        self._crops: dict[tuple[int, int, int], SpriteBank] = {}

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """The colours (N, S * S, 3) and alphas (N, S * S, 1)."""
        return self._colour.reshape(*self._alpha.shape, 3), self._alpha[:, :, None]

    def gains(self, patches: np.ndarray, backgrounds: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the gains of all sprites at squares.

        Args:
            patches: Residuals, float32 (P, S * S, 3).
            backgrounds: Index of the background of each square, (P,).

        Returns:
            float32 (P, N).
        """
        gains: np.ndarray = 2 * self._products(patches, self._backgrounds[backgrounds]) - self._norms[backgrounds]
        return gains

    def gains_on(self, patches: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
        """Return the gains of all sprites at squares, each on a background of any content.

        Args:
            patches: Residuals, float32 (P, S * S, 3).
            backgrounds: float32 (P, S * S, 3).

        Returns:
            float32 (P, N).
        """
        gains: np.ndarray = 2 * self._products(patches, backgrounds) - self._norms_on(backgrounds)
        return gains

    def crop(self, rows: slice, columns: slice) -> SpriteBank:
        """Return the sprites cut to an area; it is kept.

        Args:
            rows: Rows of the area.
            columns: Columns of the area, as many.
        """
        key = (rows.start, columns.start, rows.stop)
        if key not in self._crops:
            square = (-1, self.side, self.side)
            self._crops[key] = SpriteBank(
                self._colour.reshape(*square, 3)[:, rows, columns],
                self._alpha.reshape(*square, 1)[:, rows, columns],
                self._backgrounds.reshape(*square, 3)[:, rows, columns],
            )
        return self._crops[key]

    def _products(self, patches: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
        """Return r.p, (P, N)."""
        products: np.ndarray = patches.reshape(len(patches), -1) @ self._colour.T
        products -= np.einsum("psc,psc->ps", patches, backgrounds) @ self._alpha.T
        return products

    @cached_property
    def _norms(self) -> np.ndarray:
        """p.p on each background, (B, N)."""
        return self._norms_on(self._backgrounds)

    @cached_property
    def _colour_power(self) -> np.ndarray:
        power: np.ndarray = np.square(self._colour).sum(axis=1)
        return power

    def _norms_on(self, backgrounds: np.ndarray) -> np.ndarray:
        """p.p on backgrounds of any content, (B, N)."""
        mixed = (self.parts[0] * self._alpha[:, :, None]).reshape(self._colour.shape)
        norms: np.ndarray = self._colour_power - 2 * backgrounds.reshape(len(backgrounds), -1) @ mixed.T
        norms += np.square(backgrounds).sum(axis=-1) @ np.square(self._alpha).T
        return norms
