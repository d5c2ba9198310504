"""The batches of a run from several stores, one of which comes while it is going on; a resumed run repeats them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.checkpoints.checkpoint import read_config
from cogview.data.phases import read_phases
from cogview.data.store import StoreHeader, TokenStore
from cogview.data.store_watcher import StoreWatcher
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError
from cogview.modeling.config import ModelConfig
from cogview.training.data_loader import TrainingDataLoader, TrainingStores
from cogview.training.distributed import DistributedContext
from cogview.training.example_builder import ExampleBuilder
from cogview.training.settings import TransformerTraining

ALONE = DistributedContext(torch.device("cpu"))
BATCH = 6


@pytest.fixture
def config(tiny_checkpoint) -> ModelConfig:
    return read_config(tiny_checkpoint)


def write_store(path: Path, config: ModelConfig, count: int) -> TokenStore:
    header = StoreHeader(
        fields={"text": 20, "image": config.grid**2},
        grid=config.grid,
        num_image_codes=config.vocabulary.num_image_codes,
        num_text_pieces=config.vocabulary.num_text_pieces,
        layouts=("generate",),
        codebook_sha256=config.codebook_sha256,
        text_sha256="",
    )
    random = np.random.default_rng(count)
    with StoreWriter(path, header) as writer:
        writer.append(
            {
                "text": random.integers(config.vocabulary.num_text_pieces, size=(count, 20)).astype(np.uint16),
                "image": random.integers(config.vocabulary.num_image_codes, size=(count, config.grid**2)).astype(
                    np.uint16
                ),
            }
        )
    return TokenStore(path)


def supply(
    folder: Path, config: ModelConfig, shares: tuple[float, ...] = (1.0, 2.0), world: DistributedContext = ALONE
) -> TrainingDataLoader:
    stores = {str(folder / name): TokenStore(folder / name) for name in ("first", "second")}
    settings = TransformerTraining(steps=40, warmup_steps=1, batch_size=BATCH, seed=5)
    watch = StoreWatcher(folder / "coming", next(iter(stores.values())).header, ["generate"])
    sources = TrainingStores(stores=stores, weights=dict(zip(stores, shares, strict=True)), watcher=watch)
    return TrainingDataLoader(sources, folder / "stores.jsonl", ExampleBuilder(config, settings), world)


@pytest.fixture
def folder(tmp_path, config) -> Path:
    write_store(tmp_path / "first", config, 10).close()
    write_store(tmp_path / "second", config, 14).close()
    (tmp_path / "coming").mkdir()
    return tmp_path


def samples(batches, count: int) -> list[list[list[int]]]:
    return [next(batches).samples.tolist() for _ in range(count)]


def test_stores_are_mixed_by_their_shares(folder, config):
    given = np.concatenate(samples(supply(folder, config).batches(0), 40))
    assert given[:, 0].tolist() == list(range(40 * BATCH))
    assert np.bincount(given[:, 1]).tolist() == [79, 161]  # one of three, rounded down
    for store, size in enumerate((10, 14)):
        rows = given[given[:, 1] == store, 2]
        assert sorted(rows[:size].tolist()) == list(range(size))  # an epoch of its own


def test_a_store_that_comes_is_mixed_in_from_then_on_and_a_resumed_run_repeats_it(folder, config, capsys):
    first = supply(folder, config)
    before = samples(first.batches(0), 5)
    assert not first.refresh(5)
    write_store(folder / "aside", config, 48).close()
    shutil.move(folder / "aside", folder / "coming" / "third")
    assert first.refresh(5)
    name = folder / "coming" / "third"
    assert capsys.readouterr().err == f"\nfrom step 5 on {name} is mixed in\n"
    assert first.names[-1] == str(name)
    assert first.num_rows == 10 + 14 + 48
    assert not first.refresh(6)  # it is known
    after = samples(first.batches(5), 35)
    counts = np.bincount(np.concatenate(after)[:, 1])
    assert counts[2] == pytest.approx(35 * BATCH * 48 / 72, abs=2)  # each of its rows is as likely as one of the others
    assert [phase.first_sample for phase in read_phases(folder / "stores.jsonl")] == [0, 5 * BATCH]

    resumed = supply(folder, config)
    assert samples(resumed.batches(2), 38) == [*before[2:], *after]
    assert not resumed.refresh(3)  # the step at which it comes is planned already


def test_a_run_that_never_saved_itself_begins_anew(folder, config):
    first = supply(folder, config)
    first.batches(0)
    write_store(folder / "coming" / "third", config, 48).close()
    assert first.refresh(1)
    again = supply(folder, config)
    assert set(np.concatenate(samples(again.batches(0), 20))[:, 1]) == {0, 1}


def test_other_stores_or_shares_than_a_run_began_with_are_refused(folder, config):
    supply(folder, config).batches(0)
    with pytest.raises(
        InputError, match=r"the run began with a share of 0\.333333 of all samples for .*first, now it is 0.5"
    ):
        supply(folder, config, shares=(1.0, 1.0)).batches(3)
    shutil.rmtree(folder / "second")
    write_store(folder / "second", config, 9).close()
    with pytest.raises(
        InputError, match="second has 9 rows, the run began to read 14: bring them back, or begin another run"
    ):
        supply(folder, config).batches(3)


@pytest.mark.parametrize(("size", "remedy"), [(4, "4 or 8"), (5, "5 or 10"), (7, "7 or 7")])
def test_a_batch_that_does_not_divide_among_the_processes(folder, config, size, remedy):
    with pytest.raises(InputError) as caught:
        supply(folder, config, world=DistributedContext(ALONE.device, 0, size))
    assert str(caught.value) == f"batch_size 6 does not divide among {size} processes; {remedy} would"
