"""The codebook: nearest code, exponential moving averages, and the measures that keep every code in use.

A codebook that starts from noise and only follows its assignments collapses: most codes are never assigned and never
move. Three measures prevent it. The codebook starts from encoder outputs. Moving averages follow the assignments (van
den Oord et al., arXiv:1711.00937, appendix A). A code out of use is moved onto an encoder output far from its code.
"""

# N vectors, D width of a code, K number of codes
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

# Vectors compared at a time: their products with 8192 codes stay in the cache; an (N, K) table has no bound.
CHUNK = 256
# Names of the averages in the state of earlier runs and in earlier conversions of CogView v1, with their names now.
RENAMED_AVERAGES = {"use": "ema_cluster_size", "total": "ema_sum"}


class Quantizer(nn.Module):
    """Nearest-code quantizer whose codebook follows moving averages.

    ``codebook`` is (K, D), float32.

    Args:
        num_codes: Size K of the codebook.
        width: Width D of a code.
        normalize: Scale codes and vectors to length 1.
    """

    codebook: Tensor
    ema_cluster_size: Tensor
    ema_sum: Tensor

    def __init__(self, num_codes: int, width: int, *, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        codebook = torch.empty(num_codes, width)
        if codebook.device.type != "meta":  # where random numbers and norms import torch._dynamo, a second
            codebook = self.normalized(codebook.normal_())
        self.register_buffer("codebook", codebook)
        # Averages of the assignments of a code per update, and of the sum of its vectors.
        # Only training needs them, so a stored model does not carry them.
        self.register_buffer("ema_cluster_size", torch.zeros(num_codes), persistent=False)
        self.register_buffer("ema_sum", torch.zeros(num_codes, width), persistent=False)

    def normalized(self, vectors: Tensor) -> Tensor:
        """Return ``vectors`` (..., D), scaled to length 1 if the codebook is normalized."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the int64 index (...) of the nearest code, by squared distance, of (..., D) vectors."""
        return self._nearest_with_distance(vectors)[0]

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the (..., D) code vectors of (...) codes."""
        return F.embedding(codes, self.codebook)

    def _nearest_with_distance(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices (...) and squared distances (...) of the nearest codes."""
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
    def initialize_from(self, vectors: Tensor, generator: torch.Generator, uses: float = 1.0) -> None:
        """Put every code on an encoder output.

        Half the patches of a flat background are the same vector, and a plain random choice would put half the codes
        on one point. Codes are therefore drawn from distinct vectors; a vector repeats only when none is left.

        Args:
            vectors: Encoder outputs (N, D) of all processes (``gather_rows``), N of any size.
            generator: Source of the random choice, on the CPU, with the same seed in every process.
            uses: Assignments per update that each code may expect, where its average starts. From a larger one, unused
                codes would stay alive, and used ones lag behind the encoder, for hundreds of updates.
        """
        vectors = vectors.float()
        group_N = torch.unique(vectors.round(decimals=3), dim=0, return_inverse=True)[1].cpu()
        numbers_N = torch.arange(len(vectors))
        # The choice depends on where a vector stands, not on its value: rounding, as of another number of processes,
        # must not change all codes.
        first_M = torch.full((int(group_N.max()) + 1,), len(vectors)).scatter_reduce_(0, group_N, numbers_N, "amin")
        rank_N = torch.randperm(len(vectors), generator=generator)
        chosen_K = first_M[rank_N[first_M].argsort()][: len(self.codebook)]
        if len(chosen_K) < len(self.codebook):
            extra = torch.randint(len(first_M), (len(self.codebook) - len(chosen_K),), generator=generator)
            chosen_K = torch.cat([chosen_K, first_M[extra]])
        self.reset_codebook(self.normalized(vectors[chosen_K.to(vectors.device)]), uses)
        self._broadcast()

    @torch.no_grad()
    def reset_codebook(self, codes: Tensor, uses: float = 1.0) -> None:
        """Replace the codebook by ``codes`` (K, D), with averages of ``uses`` assignments per update for each."""
        self.codebook.copy_(codes)
        self.ema_cluster_size.fill_(uses)
        self.ema_sum.copy_(self.codebook * uses)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, decay: float) -> None:
        """Move the codes towards their vectors; statistics are summed over all processes.

        Args:
            vectors: Encoder outputs (..., D).
            codes: Their nearest codes (...).
            decay: Decay of the moving averages, in [0, 1].
        """
        flat_ND, codes_N = vectors.reshape(-1, vectors.shape[-1]).float(), codes.reshape(-1)
        cluster_size = torch.bincount(codes_N, minlength=len(self.codebook)).float()
        cluster_sum = torch.zeros_like(self.ema_sum).index_add_(0, codes_N, flat_ND)
        if _is_distributed():
            dist.all_reduce(cluster_size)
            dist.all_reduce(cluster_sum)
        self.ema_cluster_size.lerp_(cluster_size, 1 - decay)
        self.ema_sum.lerp_(cluster_sum, 1 - decay)
        alive = self.ema_cluster_size > 1e-4
        moved = self.normalized(self.ema_sum / self.ema_cluster_size.clamp_min(1e-4).unsqueeze(1))
        self.codebook.copy_(torch.where(alive.unsqueeze(1), moved, self.codebook))

    @torch.no_grad()
    def restart_dead_codes(self, vectors: Tensor, threshold: float, generator: torch.Generator) -> int:
        """Move codes out of use onto vectors far from their codes.

        A vector is drawn with a probability proportional to its squared distance from its code, as in k-means++
        (Arthur and Vassilvitskii, 2007), so that a new code lowers the error.

        Args:
            vectors: Encoder outputs (..., D) of the batch of this process. All processes give equally many.
            threshold: Average assignments per update below which a code is out of use.
            generator: Source of the random choice, on the CPU, with the same seed in every process.

        Returns:
            The number of codes that were moved.
        """
        dead = (self.ema_cluster_size < threshold).nonzero().flatten()
        flat_ND = vectors.reshape(-1, vectors.shape[-1]).float()
        distances = gather_rows(self._nearest_with_distance(flat_ND)[1])
        wanted = min(len(dead), int((distances > 1e-6).sum()))
        if wanted == 0:
            return 0
        picks = torch.multinomial(distances.cpu() + 1e-12, wanted, generator=generator).to(flat_ND.device)
        moved = gather_rows(flat_ND)[picks]
        dead = dead[: len(picks)]
        self.codebook[dead] = moved
        self.ema_cluster_size[dead] = 2 * threshold  # several updates pass before the code may count as dead again
        self.ema_sum[dead] = moved * 2 * threshold
        self._broadcast()
        return len(picks)

    def _broadcast(self) -> None:
        """Broadcast the codebook and averages of process 0, so that unlike devices cannot drift apart."""
        if _is_distributed():
            for buffer in (self.codebook, self.ema_cluster_size, self.ema_sum):
                dist.broadcast(buffer, 0)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (N, ...) of all processes, in the order of their ranks; each process has equally many."""
    if not _is_distributed():
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _is_distributed() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized()
