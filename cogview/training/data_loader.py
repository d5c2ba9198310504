"""Batches of a run from a mixture of token stores, to which new stores may be added during training."""

# B rows
from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset

from cogview.data.mixture import MixedStore, Mixture
from cogview.data.phases import Phase, append_phase, check_same_start, read_phases
from cogview.data.store import TokenStore
from cogview.data.store_watcher import StoreWatcher
from cogview.signals import worker_init
from cogview.training.distributed import DistributedContext, log_main
from cogview.training.example_builder import ExampleBuilder
from cogview.training.examples import TrainingBatch

# A forked worker would keep all memory of this process, as it was then, and its connections.
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PREFETCH_FACTOR = 4  # batches that each worker builds ahead of time
OTHER_STORES = 1  # a key of the random numbers that choose rows for tasks that a sample's store cannot feed


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStores:
    """The stores of a run.

    Attributes:
        stores: Stores to train on, by the names that the recipe has for them.
        weights: Their shares of the rows; 1 for a store that is missing here.
        watcher: Finds new stores during training; None for a fixed mixture.
        open_store: Opens a store by name, for those that the watcher has found.
    """

    stores: Mapping[str, TokenStore]
    weights: Mapping[str, float] | None = None
    watcher: StoreWatcher | None = None
    open_store: Callable[[str], TokenStore] = TokenStore

    def first_phase(self) -> Phase:
        """Return the mixture of a new run."""
        return Phase(
            first_sample=0,
            names=tuple(self.stores),
            weights=tuple((self.weights or {}).get(name, 1.0) for name in self.stores),
            sizes=tuple(map(len, self.stores.values())),
        )


class StepDataset(Dataset[TrainingBatch]):
    """Map-style dataset of steps: item s is the batch of this process in step s.

    It is a function of the seed, the phases of the mixture, and s.
    """

    def __init__(
        self,
        store: MixedStore,
        mixture: Mixture,
        builder: ExampleBuilder,
        context: DistributedContext,
        num_shards: int = 1,
    ) -> None:
        """Combine stores and a builder.

        Args:
            store: The stores.
            mixture: Which store and row each sample takes.
            builder: Builds the batches.
            context: This process among all.
            num_shards: Number of threads that share a batch.
        """
        self.store = store
        self.mixture = mixture
        self.builder = builder
        self.context = context
        self.num_shards = num_shards

    def __getitem__(self, step: int) -> TrainingBatch:
        size = self.builder.settings.batch_size
        local = self.context.local_slice(size)
        samples = np.arange(step * size, (step + 1) * size)
        # Decisions are made for all rows of the step, so that they do not depend on the number of processes.
        plan = self.builder.plan_rows(step, size, self.store.fields["image"])
        stores, numbers = self._locate(step, samples, plan.tasks)
        located = np.stack([samples, stores, numbers], axis=1)[local]
        rows = self.store.read(stores[local], numbers[local])
        return self.builder.build_batch(step, rows, plan.select(local), num_shards=self.num_shards, samples=located)

    def _locate(self, step: int, samples: np.ndarray, tasks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the store and the row of each sample of a step.

        Where the store of a sample cannot feed its task, a row of the others is sampled at random, by the shares of the
        stores. The shares of the tasks are therefore exact, and those of the stores only where each feeds every task.

        Args:
            step: The step.
            samples: Numbers of its samples (B,).
            tasks: Task of each.
        """
        stores, numbers = self.mixture.locate(samples)
        phase = self.mixture.phase_of(int(samples[0]))
        feeding = {task: self.store.feeding(task)[: len(phase.names)] for task in dict.fromkeys(tasks)}
        random = np.random.default_rng([self.builder.settings.seed, step, OTHER_STORES])
        for index, task in enumerate(tasks):
            if not feeding[task][stores[index]]:
                shares = np.array(phase.weights) * feeding[task]
                store = random.choice(len(shares), p=shares / shares.sum())
                stores[index], numbers[index] = store, random.integers(phase.sizes[store])
        return stores, numbers

    def from_step(self, step: int) -> Iterator[TrainingBatch]:
        """Iterate over the batches from ``step`` on; workers, if there are any, build them ahead of time."""
        num_workers = self.builder.settings.num_workers
        return iter(
            DataLoader[TrainingBatch](
                self,
                sampler=cast(Any, range(step, self.builder.settings.steps)),
                batch_size=None,
                collate_fn=cast(Any, _identity),
                num_workers=num_workers,
                prefetch_factor=PREFETCH_FACTOR if num_workers else None,
                multiprocessing_context=START_METHOD if num_workers else None,
                worker_init_fn=worker_init,
            )
        )


def _identity(batch: TrainingBatch) -> TrainingBatch:
    return batch


class TrainingDataLoader:
    """Batches from a mixture of stores, resumable and the same for any number of processes.

    A file of phases records which stores are mixed from which sample on. A resumed run therefore repeats its samples,
    whatever stores exist by then.
    """

    def __init__(
        self,
        sources: TrainingStores,
        phases_file: Path,
        builder: ExampleBuilder,
        context: DistributedContext,
        num_threads: int = 1,
    ) -> None:
        """Load batches for one process.

        Args:
            sources: The stores.
            phases_file: The file of phases in the run folder.
            builder: Builds the batches.
            context: This process among all.
            num_threads: Number of threads that share a batch.

        Raises:
            InputError: The batch size does not divide among the processes.
        """
        self.sources = sources
        self.phases_file = phases_file
        self.builder = builder
        self.context = context
        self.num_threads = num_threads
        context.local_slice(builder.settings.batch_size)  # it divides
        self._store = MixedStore(list(sources.stores.values()))
        self._first = sources.first_phase()
        self._phases: list[Phase] = []

    @property
    def _last(self) -> Phase:
        """The latest phase."""
        return self._phases[-1] if self._phases else self._first

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the open stores."""
        return self._last.names

    @property
    def num_rows(self) -> int:
        """Number of rows of all stores."""
        return sum(self._last.sizes)

    def batches(self, step: int) -> Iterator[TrainingBatch]:
        """Iterate over the batches of this process from ``step`` on.

        Raises:
            InputError: The recorded phases do not fit the stores.
        """
        if not self._phases:
            self._apply_phases(self.context.run_on_main(lambda: self._initial_phases(step)))
        mixture = Mixture(self._phases, self.builder.settings.seed)
        return StepDataset(self._store, mixture, self.builder, self.context, self.num_threads).from_step(step)

    def refresh(self, step: int) -> bool:
        """Add new stores to the mixture from ``step`` on; return whether there were any."""
        watcher, last = self.sources.watcher, self._last
        if watcher is None:
            return False

        def look() -> Phase | None:
            found = {str(store.path): len(store) for store in watcher.new_stores(last.names)}
            first_sample = step * self.builder.settings.batch_size
            if not found or first_sample <= last.first_sample:  # the phases of steps to repeat are recorded already
                return None
            phase = last.with_stores(first_sample, found)
            append_phase(self.phases_file, phase)
            return phase

        phase = self.context.run_on_main(look)
        if phase is None:
            return False
        self._apply_phases([*self._phases, phase])
        for name in phase.names[len(last.names) :]:
            log_main(f"\nfrom step {step} on {name} is mixed in", self.context)
        return True

    def _initial_phases(self, step: int) -> list[Phase]:
        """Return the recorded phases; for a new run, record the first one."""
        if step == 0 and self.phases_file.exists():
            self.phases_file.unlink()  # of a run that saved no checkpoint
        phases = read_phases(self.phases_file)
        if not phases:
            append_phase(self.phases_file, self._first)
            return [self._first]
        check_same_start(phases, self._first)
        return phases

    def _apply_phases(self, phases: list[Phase]) -> None:
        """Use ``phases``, after opening the stores that only they name."""
        for name in phases[-1].names[len(self._store.stores) :]:
            self._store = self._store.with_store(self.sources.open_store(name))
        self._store.check_sizes(phases[-1])
        self._phases = phases

    def close(self) -> None:
        """Close the stores."""
        for store in self._store.stores:
            store.close()
