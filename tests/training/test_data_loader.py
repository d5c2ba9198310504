"""Batches from a mixture of stores, to which one is added during training; a resumed run repeats them."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogview.checkpoints.checkpoint import read_config
from cogview.data.mixture import MixedStore, Mixture
from cogview.data.phases import Phase, read_phases
from cogview.data.sampling_order import sample_index
from cogview.data.store import StoreHeader, TokenStore
from cogview.data.store_watcher import StoreWatcher
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError
from cogview.modeling.config import ModelConfig
from cogview.training.data_loader import StepDataset, TrainingDataLoader, TrainingStores
from cogview.training.distributed import DistributedContext
from cogview.training.example_builder import ExampleBuilder
from cogview.training.examples import TrainingBatch
from cogview.training.settings import TransformerTraining
from tests.training import factories
from tests.training.factories import SINGLE, new_model, training_settings

BATCH = 6


@pytest.fixture
def config(tiny_checkpoint) -> ModelConfig:
    return read_config(tiny_checkpoint)


def write_store(path: Path, config: ModelConfig, count: int, *, large: bool = False) -> TokenStore:
    header = StoreHeader(
        fields={"text": 20, "image": config.grid**2, **({"large": 4 * config.grid**2} if large else {})},
        grid=config.grid,
        num_image_codes=config.vocabulary.num_image_codes,
        num_text_pieces=config.vocabulary.num_text_pieces,
        layouts=("generate", "upscale") if large else ("generate",),
        codebook_sha256=config.codebook_sha256,
        text_sha256="",
    )
    random = np.random.default_rng(count)
    with StoreWriter(path, header) as writer:
        writer.append(
            {
                name: random.integers(
                    config.vocabulary.num_text_pieces if name == "text" else config.vocabulary.num_image_codes,
                    size=(count, width),
                ).astype(np.uint16)
                for name, width in header.fields.items()
            }
        )
    return TokenStore(path)


def mixture_loader(
    folder: Path, config: ModelConfig, shares: tuple[float, ...] = (1.0, 2.0), world: DistributedContext = SINGLE
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


def test_batches_mix_stores_by_their_weights(folder, config):
    given = np.concatenate(samples(mixture_loader(folder, config).batches(0), 40))
    assert given[:, 0].tolist() == list(range(40 * BATCH))
    assert np.bincount(given[:, 1]).tolist() == [79, 161]  # one of three, rounded down
    for store, size in enumerate((10, 14)):
        rows = given[given[:, 1] == store, 2]
        assert sorted(rows[:size].tolist()) == list(range(size))  # an epoch of this store


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_come_from_stores_that_can_feed_their_task(tmp_path, config, world_size):
    """Upscaling needs large images, which one store of three has; the shares of the tasks stay as they are."""
    stores = {
        name: write_store(tmp_path / name, config, count, large=name == "large")
        for name, count in (("first", 10), ("second", 14), ("large", 12))
    }
    settings = TransformerTraining(
        steps=100, warmup_steps=1, batch_size=BATCH, seed=5, tasks={"generate": 1.0, "upscale": 1.0}
    )
    builder = ExampleBuilder(replace(config, tasks=("generate", "upscale")), settings)
    mixture = Mixture([Phase(first_sample=0, names=tuple(stores), weights=(3, 2, 1), sizes=(10, 14, 12))], 5)
    mixed = MixedStore(list(stores.values()))
    tasks, located = [], []
    for step in range(100):
        parts = [
            StepDataset(mixed, mixture, builder, DistributedContext(SINGLE.device, rank, world_size))[step]
            for rank in range(world_size)
        ]
        tasks += builder.plan_rows(step, BATCH, config.grid**2).tasks
        located += np.concatenate([part.samples for part in parts]).tolist()
    assert 240 < tasks.count("upscale") < 360
    upscaled = [row for (_, store, row), task in zip(located, tasks, strict=True) if task == "upscale"]
    assert {store for (_, store, _), task in zip(located, tasks, strict=True) if task == "upscale"} == {2}
    assert set(upscaled) == set(range(12))
    generated = [store for (_, store, _), task in zip(located, tasks, strict=True) if task == "generate"]
    _, expected = mixture.locate(np.arange(100 * BATCH))
    assert np.bincount(generated, minlength=3).argmax() == 0
    kept = [number for number, task in enumerate(tasks) if task == "generate"]
    assert [located[number][2] for number in kept] == expected[kept].tolist()


def test_refresh_adds_a_new_store_and_a_resumed_run_repeats_it(folder, config, capsys):
    first = mixture_loader(folder, config)
    before = samples(first.batches(0), 5)
    assert not first.refresh(5)
    write_store(folder / "aside", config, 48).close()
    shutil.move(folder / "aside", folder / "coming" / "third")
    assert first.refresh(5)
    name = folder / "coming" / "third"
    assert capsys.readouterr().err == f"\nfrom step 5 on {name} is mixed in\n"
    assert first.names[-1] == str(name)
    assert first.num_rows == 10 + 14 + 48
    assert not first.refresh(6)  # it is in use already
    after = samples(first.batches(5), 35)
    counts = np.bincount(np.concatenate(after)[:, 1])
    assert counts[2] == pytest.approx(35 * BATCH * 48 / 72, abs=2)  # each row is as likely as any other
    assert [phase.first_sample for phase in read_phases(folder / "stores.jsonl")] == [0, 5 * BATCH]

    resumed = mixture_loader(folder, config)
    assert samples(resumed.batches(2), 38) == [*before[2:], *after]
    assert not resumed.refresh(3)  # that phase is recorded already


def test_batches_forget_the_phases_of_a_run_without_a_checkpoint(folder, config):
    first = mixture_loader(folder, config)
    first.batches(0)
    write_store(folder / "coming" / "third", config, 48).close()
    assert first.refresh(1)
    again = mixture_loader(folder, config)
    assert set(np.concatenate(samples(again.batches(0), 20))[:, 1]) == {0, 1}


def test_batches_refuse_other_stores_or_weights_than_recorded(folder, config):
    mixture_loader(folder, config).batches(0)
    with pytest.raises(
        InputError, match=r"the run began with a share of 0\.333333 of all samples for .*first, now it is 0.5"
    ):
        mixture_loader(folder, config, shares=(1.0, 1.0)).batches(3)
    shutil.rmtree(folder / "second")
    write_store(folder / "second", config, 9).close()
    with pytest.raises(
        InputError, match="second has 9 rows, the run began to read 14: bring them back, or begin another run"
    ):
        mixture_loader(folder, config).batches(3)


@pytest.mark.parametrize(("size", "remedy"), [(4, "4 or 8"), (5, "5 or 10"), (7, "7 or 7")])
def test_data_loader_refuses_a_batch_that_does_not_divide_among_processes(folder, config, size, remedy):
    with pytest.raises(InputError) as caught:
        mixture_loader(folder, config, world=DistributedContext(SINGLE.device, 0, size))
    assert str(caught.value) == f"batch_size 6 does not divide among {size} processes; {remedy} would"


def single_store_loader(store: TokenStore, settings: TransformerTraining, phases_file: Path) -> TrainingDataLoader:
    stores = TrainingStores(stores={str(store.path): store})
    return TrainingDataLoader(stores, phases_file, ExampleBuilder(new_model().config, settings), SINGLE)


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_a_function_of_seed_and_step(tmp_path, num_workers):
    store = factories.write_store(tmp_path, 21)
    settings = training_settings(steps=7, seed=3, num_workers=num_workers)
    batches = list(single_store_loader(store, settings, tmp_path / "stores.jsonl").batches(0))
    assert len(batches) == 7
    for number, batch in enumerate(batches):
        samples = np.arange(8 * number, 8 * number + 8)
        numbers = sample_index(3, samples, 21)
        assert batch.samples.tolist() == [[k, 0, row] for k, row in zip(samples, numbers, strict=True)]
        assert set(batch.rows) == {"text", "image"}
        for name, values in store.read(numbers).items():
            assert np.array_equal(batch.rows[name], values)
    resumed = list(single_store_loader(store, settings, tmp_path / "stores.jsonl").batches(5))
    assert len(resumed) == 2
    assert all(np.array_equal(a.rows["image"], b.rows["image"]) for a, b in zip(resumed, batches[5:], strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_step_dataset_divides_rows_and_plans_among_processes(tmp_path, size):
    store = factories.write_store(tmp_path, 21)
    settings = training_settings(steps=3, seed=3, caption_dropout=0.5, full_mask_rate=0.5)
    mixture = Mixture([Phase(first_sample=0, names=("store",), weights=(1.0,), sizes=(21,))], 3)
    builder = ExampleBuilder(new_model().config, settings)

    def share(rank: int, world_size: int) -> list[TrainingBatch]:
        return list(
            StepDataset(
                MixedStore([store]), mixture, builder, DistributedContext(SINGLE.device, rank, world_size)
            ).from_step(1)
        )

    whole, shares = share(0, 1), [share(rank, size) for rank in range(size)]
    for number, batch in enumerate(whole):
        local = [share[number] for share in shares]
        assert np.array_equal(np.concatenate([part.samples for part in local]), batch.samples)
        assert np.array_equal(sum(part.target_counts for part in local), batch.target_counts)
        assert sum(part.num_tokens for part in local) == batch.num_tokens
        assert input_rows(local) == input_rows([batch])


def input_rows(batches: Sequence[TrainingBatch]) -> list[list[int]]:
    """Return the input rows without padding, sorted."""
    pad = new_model().config.vocabulary.pad
    lines = [line.tolist() for each in batches for part in each.thread_shards[0] for line in part.inputs]
    return sorted([code for code in line if code != pad] for line in lines)
