"""The codebook: nearest codes, moving averages by hand, and that every code is put to use."""

# N vectors, D width of a code, K number of codes

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import cogview
from cogview.vqvae import quantizer as module
from cogview.vqvae.quantizer import Quantizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(num_codes: int, width: int, *, normalize: bool = False) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(num_codes, width, normalize=normalize)


# One vector, odd, one short of a chunk, a chunk, one more, several chunks and a rest.
@pytest.mark.parametrize("count", [1, 7, module.CHUNK - 1, module.CHUNK, module.CHUNK + 1, 3 * module.CHUNK + 5])
@pytest.mark.parametrize("normalize", [False, True])
def test_nearest_equals_an_exhaustive_search_in_float64(count, normalize):
    quantizer = make(300, 6, normalize=normalize)
    vectors = quantizer.normalized(torch.randn(count, 6, generator=seeded(1)))
    distances_NK = (vectors.double()[:, None] - quantizer.codebook.double()).square().sum(dim=-1)
    assert torch.equal(quantizer.nearest(vectors), distances_NK.argmin(dim=1))


def test_nearest_inverts_lookup_in_the_same_shape():
    quantizer = make(40, 5)
    codes = torch.randint(40, (2, 3, 4), generator=seeded())
    assert torch.equal(quantizer.nearest(quantizer.lookup(codes)), codes)


def test_nearest_compares_vectors_in_chunks(monkeypatch):
    quantizer, vectors = make(64, 4), torch.randn(1000, 4, generator=seeded(1))
    expected = quantizer.nearest(vectors)
    rows = []
    addmm = torch.addmm

    def watched(*args):
        table = addmm(*args)
        rows.append(len(table))
        return table

    monkeypatch.setattr(torch, "addmm", watched)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert torch.equal(quantizer.nearest(vectors), expected)
    assert max(rows) == 7
    assert sum(rows) == 1000


def test_nearest_is_exact_under_autocast():
    quantizer, vectors = make(2000, 8, normalize=True), torch.randn(500, 8, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = quantizer.nearest(vectors), (vectors @ quantizer.codebook.T).argmax(dim=1)
    exact = (vectors.double() @ quantizer.codebook.double().T).argmax(dim=1)
    assert torch.equal(found, exact)
    assert not torch.equal(rounded, exact)  # the danger is real


def test_update_moves_the_averages_as_computed_by_hand():
    quantizer = make(3, 2)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0], [9.0, 9.0]]))
    quantizer.ema_cluster_size.copy_(torch.tensor([1.0, 2.0, 0.0]))
    quantizer.ema_sum.copy_(torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 0.0]]))
    # Code 0 is chosen by (1, 1) and (3, 1), code 1 by (4, 2), code 2 by nobody.
    quantizer.update(torch.tensor([[1.0, 1.0], [4.0, 2.0], [3.0, 1.0]]), torch.tensor([0, 1, 0]), decay=0.75)
    torch.testing.assert_close(
        quantizer.ema_cluster_size, torch.tensor([0.75 * 1 + 0.25 * 2, 0.75 * 2 + 0.25 * 1, 0.0])
    )
    torch.testing.assert_close(quantizer.ema_sum, torch.tensor([[1.0, 0.5], [7.0, 0.5], [0.0, 0.0]]))
    expected = torch.tensor([[1.0 / 1.25, 0.5 / 1.25], [7.0 / 1.75, 0.5 / 1.75], [9.0, 9.0]])
    torch.testing.assert_close(quantizer.codebook, expected)


def test_update_keeps_normalized_codes_at_length_one():
    quantizer = make(20, 4, normalize=True)
    vectors = quantizer.normalized(torch.randn(500, 4, generator=seeded(1)))
    for _ in range(5):
        quantizer.update(vectors, quantizer.nearest(vectors), decay=0.5)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(20))


HALF_A_BATCH = """
import sys, torch
import torch.distributed as dist
from cogview.vqvae.quantizer import Quantizer
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
quantizer = Quantizer(*given["codebook"].shape, normalize=True)
quantizer.codebook.copy_(given["codebook"])
for vectors in given["vectors"]:
    half = vectors.chunk(2)[rank]
    quantizer.update(half, quantizer.nearest(half), 0.9)
updated = quantizer.codebook.clone()
revived = quantizer.restart_dead_codes(half, 0.05, torch.Generator().manual_seed(0))
state = {"updated": updated, "revived": revived}
state |= {"ema_cluster_size": quantizer.ema_cluster_size, "codebook": quantizer.codebook}
torch.save(state, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_update_of_two_processes_equals_one_process_with_the_whole_batch(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    alone = make(64, 4, normalize=True)
    batches = [F.normalize(torch.randn(40, 4, generator=seeded(step + 1)), dim=-1) for step in range(3)]
    torch.save({"codebook": alone.codebook.clone(), "vectors": batches}, tmp_path / "given.pt")
    for vectors in batches:
        alone.update(vectors, alone.nearest(vectors), 0.9)

    environment = {**os.environ, "PYTHONPATH": str(Path(cogview.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", HALF_A_BATCH, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first["updated"], alone.codebook)
    assert first["revived"] == second["revived"] > 0
    for name in ("updated", "ema_cluster_size", "codebook"):
        assert torch.equal(first[name], second[name]), name


def test_initialize_from_gives_every_code_a_distinct_vector():
    """Nine of ten vectors are one flat background; a plain random choice would put nine of ten codes there."""
    quantizer = make(50, 3)
    vectors = torch.cat([torch.full((900, 3), 0.25), torch.randn(100, 3, generator=seeded())])
    quantizer.initialize_from(vectors, seeded())
    assert len(torch.unique(quantizer.codebook, dim=0)) == 50
    assert torch.cdist(quantizer.codebook, vectors).amin(dim=1).max() < 1e-3  # each is an encoder output
    assert torch.equal(quantizer.ema_cluster_size, torch.ones(50))
    assert torch.equal(quantizer.ema_sum, quantizer.codebook)


def test_initialize_from_uses_all_vectors_when_there_are_fewer_than_codes():
    quantizer = make(50, 3)
    vectors = torch.cat([torch.full((900, 3), 0.25), torch.randn(20, 3, generator=seeded())])
    quantizer.initialize_from(vectors, seeded())
    assert len(torch.unique(quantizer.codebook, dim=0)) == 21


def test_restart_dead_codes_moves_them_onto_distant_vectors_and_no_others():
    quantizer = make(4, 2)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 0.0], [60.0, 0.0]]))
    quantizer.ema_cluster_size.copy_(torch.tensor([5.0, 5.0, 0.001, 0.0]))
    quantizer.ema_sum.copy_(quantizer.codebook * quantizer.ema_cluster_size.unsqueeze(1))
    well_served = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).repeat(100, 1)
    badly_served = torch.tensor([[-8.0, 3.0], [2.0, 9.0]])
    assert quantizer.restart_dead_codes(torch.cat([well_served, badly_served]), 0.01, seeded()) == 2
    assert torch.equal(quantizer.codebook[:2], torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert sorted(quantizer.codebook[2:].tolist()) == badly_served.tolist()
    torch.testing.assert_close(quantizer.ema_cluster_size, torch.tensor([5.0, 5.0, 0.02, 0.02]))
    torch.testing.assert_close(quantizer.ema_sum[2:], quantizer.codebook[2:] * 0.02)


def test_restart_dead_codes_moves_none_when_vectors_are_exact_or_no_code_is_dead():
    quantizer = make(3, 2)
    before = quantizer.codebook.clone()
    assert (
        quantizer.restart_dead_codes(quantizer.codebook.repeat(4, 1), 0.01, seeded()) == 0
    )  # all dead, all vectors exact
    quantizer.ema_cluster_size.fill_(1.0)
    assert quantizer.restart_dead_codes(torch.randn(20, 2, generator=seeded(1)), 0.01, seeded()) == 0
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("normalize", [False, True])
def test_quantizer_measures_prevent_the_collapse_of_the_codebook(normalize):
    """256 codes for 600 clusters in a corner of space, half of the vectors one background, the whole drifting."""
    generator = seeded(3)
    clusters = 2 + 0.5 * torch.randn(600, 8, generator=generator)

    def batch(step: int) -> torch.Tensor:
        chosen = clusters[torch.randint(600, (512,), generator=generator)]
        chosen[:256] = clusters[0]
        drift = torch.zeros(8)
        drift[0] = -3 * step / 150  # the encoder learns too
        return quantizer.normalized(chosen + drift + 0.01 * torch.randn(512, 8, generator=generator))

    used = {}
    for measures in (True, False):
        quantizer = make(256, 8, normalize=normalize)
        if measures:
            quantizer.initialize_from(torch.cat([batch(0) for _ in range(4)]), generator)
        for step in range(150):
            vectors = batch(step)
            quantizer.update(vectors, quantizer.nearest(vectors), 0.9)
            if measures and step % 5 == 0:
                quantizer.restart_dead_codes(vectors, 0.05, generator)
        seen = torch.cat([quantizer.nearest(batch(150)) for _ in range(20)])
        used[measures] = len(seen.unique()) / 256
    assert used[True] > 0.9
    assert used[False] < 0.3
