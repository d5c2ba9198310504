"""The codebook: nearest code, exponential moving averages, and the measures that keep every code in use.

A codebook that starts from noise and is only ever moved towards its own assignments collapses: most codes are never
chosen, so never move. Three measures prevent it: the codebook starts from encoder outputs, averages follow the
assignments (van den Oord et al., arXiv:1711.00937, appendix A), and a code that has fallen out of use is placed on an
encoder output that is badly served today.
"""

# N vectors, D width of a code, K number of codes
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = (
    256  # vectors compared at a time: their products with 8192 codes stay in the cache, an (N, K) table has no bound
)


class Quantizer(nn.Module):
    """``codebook`` is (K, D), float32. With ``normalize``, codes and vectors have length 1."""

    codebook: Tensor
    use: Tensor
    total: Tensor

    def __init__(self, num_codes: int, width: int, *, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("codebook", self.normalized(torch.randn(num_codes, width)))
        # Averages of how often a code is chosen per update, and of the sum of the vectors that chose it.
        # They belong to training alone, so a stored model does not carry them.
        self.register_buffer("use", torch.zeros(num_codes), persistent=False)
        self.register_buffer("total", torch.zeros(num_codes, width), persistent=False)

    def normalized(self, vectors: Tensor) -> Tensor:
        """``vectors`` (..., D), scaled to length 1 if this codebook lives on the sphere."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def nearest(self, vectors: Tensor) -> Tensor:
        """For (..., D) vectors the int64 index (...) of the nearest code by squared distance."""
        return self._nearest_with_distance(vectors)[0]

    def lookup(self, codes: Tensor) -> Tensor:
        """The (..., D) code vectors of (...) codes."""
        return F.embedding(codes, self.codebook)

    def _nearest_with_distance(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (...) and squared distances (...)."""
        flat_ND = vectors.reshape(-1, vectors.shape[-1]).float()
        half_length_K = self.codebook.square().sum(dim=1) / 2
        codes, distances = [], []
        # The products decide between near codes, so autocast must not round them.
        with torch.autocast(flat_ND.device.type, enabled=False):
            for chunk in flat_ND.split(CHUNK):
                best, index = torch.addmm(-half_length_K, chunk, self.codebook.T).max(dim=1)
                codes.append(index)
                distances.append((chunk.square().sum(dim=1) - 2 * best).clamp_min(0))
        return torch.cat(codes).view(vectors.shape[:-1]), torch.cat(distances).view(vectors.shape[:-1])

    @torch.no_grad()
    def initialize_from(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Put every code on an encoder output; ``vectors`` (N, D), N of any size.

        Half the patches of a flat background are the same vector, so a plain random choice would put half the
        codes on one point: only distinct vectors are drawn from, and none is used twice while there are others.
        """
        source = torch.unique(vectors.float().round(decimals=3), dim=0)
        order = torch.randperm(len(source), generator=generator)[: len(self.codebook)]
        chosen = source[order.to(source.device)]
        if len(chosen) < len(self.codebook):
            extra = torch.randint(len(source), (len(self.codebook) - len(chosen),), generator=generator)
            chosen = torch.cat([chosen, source[extra.to(source.device)]])
        self.reset_codebook(self.normalized(chosen))
        self._broadcast()

    @torch.no_grad()
    def reset_codebook(self, codes: Tensor) -> None:
        """Make ``codes`` (K, D) the codebook, each as if it had been chosen once per update so far."""
        self.codebook.copy_(codes)
        self.use.fill_(1.0)
        self.total.copy_(self.codebook)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, decay: float) -> None:
        """Move the codes towards the vectors (..., D) that chose them; statistics are summed over all processes."""
        flat_ND, codes_N = vectors.reshape(-1, vectors.shape[-1]).float(), codes.reshape(-1)
        use = torch.bincount(codes_N, minlength=len(self.codebook)).float()
        total = torch.zeros_like(self.total).index_add_(0, codes_N, flat_ND)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(use)
            dist.all_reduce(total)
        self.use.lerp_(use, 1 - decay)
        self.total.lerp_(total, 1 - decay)
        alive = self.use > 1e-4
        moved = self.normalized(self.total / self.use.clamp_min(1e-4).unsqueeze(1))
        self.codebook.copy_(torch.where(alive.unsqueeze(1), moved, self.codebook))

    @torch.no_grad()
    def restart_dead_codes(self, vectors: Tensor, threshold: float, generator: torch.Generator) -> int:
        """Move codes used less than ``threshold`` times per update onto badly served vectors; return how many.

        A vector is drawn with a probability proportional to its squared distance from its code, as k-means++ does
        (Arthur and Vassilvitskii, 2007), so that new codes go where they help.
        """
        dead = (self.use < threshold).nonzero().flatten()
        flat_ND = vectors.reshape(-1, vectors.shape[-1]).float()
        _, distances = self._nearest_with_distance(flat_ND)
        wanted = min(len(dead), int((distances > 1e-6).sum()))
        if dist.is_available() and dist.is_initialized():  # rank 0 decides, so that all keep one codebook
            count = torch.tensor(wanted, device=flat_ND.device)
            dist.broadcast(count, 0)
            wanted = int(count)
        if wanted == 0:
            return 0
        distances = distances + 1e-12
        picks = torch.multinomial(distances.cpu(), min(wanted, len(flat_ND)), generator=generator).to(flat_ND.device)
        dead = dead[: len(picks)]
        self.codebook[dead] = flat_ND[picks]
        self.use[dead] = 2 * threshold  # a fair chance to be chosen before it is judged again
        self.total[dead] = flat_ND[picks] * 2 * threshold
        self._broadcast()
        return len(picks)

    def _broadcast(self) -> None:
        """Give every process the codebook of process 0, whose vectors they did not see."""
        if dist.is_available() and dist.is_initialized():
            for buffer in (self.codebook, self.use, self.total):
                dist.broadcast(buffer, 0)
