"""The batches of a run from its stores, to which new ones may come while it is going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cogview.data.mixture import MixedStore, Mixture
from cogview.data.phases import Phase, append_phase, check_same_start, read_phases
from cogview.data.store import TokenStore
from cogview.data.store_watcher import StoreWatcher
from cogview.errors import InputError
from cogview.training.distributed import DistributedContext, log_main
from cogview.training.examples import ExampleBuilder, StepDataset, TrainingBatch


class TrainingDataLoader:
    """What the loop asks for batches.

    ``stores``, by the names that the recipe has for them, are mixed by ``shares``. The file ``ledger`` says which
    stores are mixed from which sample on, so that a resumed run repeats what it was, whatever stores there are by then.
    ``watch`` looks for new ones, which ``open_store`` opens by name.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        weights: Sequence[float],
        phases_file: Path,
        builder: ExampleBuilder,
        world: DistributedContext,
        *,
        watcher: StoreWatcher | None = None,
        open_store: Callable[[str], TokenStore] = TokenStore,
        num_threads: int = 1,
        micro_batch_size: int = 0,
    ) -> None:
        self.builder = builder
        self.world = world
        self.phases_file = phases_file
        self.watcher = watcher
        self.open_store = open_store
        self.num_threads = num_threads
        self.micro_batch_size = micro_batch_size
        size = builder.settings.batch_size
        if size % world.size:
            near = size - size % world.size
            raise InputError(
                f"batch_size {size} does not divide among {world.size} processes; {near or world.size} or "
                f"{near + world.size} would"
            )
        self._store = MixedStore(list(stores.values()))
        self._first = Phase(
            first_sample=0, names=tuple(stores), weights=tuple(weights), sizes=tuple(map(len, stores.values()))
        )
        self._phases: list[Phase] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The stores that it has open."""
        return self._phases[-1].names if self._phases else self._first.names

    @property
    def num_rows(self) -> int:
        """Rows of all of them."""
        return sum((self._phases[-1] if self._phases else self._first).sizes)

    def batches(self, step: int) -> Iterator[TrainingBatch]:
        """Those of ``step`` and all after it, of the rows of this process."""
        if not self._phases:
            self._apply_phases(self.world.run_on_main(lambda: self._initial_phases(step)))
        lectures = StepDataset(
            self._store,
            Mixture(self._phases, self.builder.settings.seed),
            self.builder,
            self.world,
            num_shards=self.num_threads,
            micro_batch_size=self.micro_batch_size,
        )
        return lectures.from_step(step)

    def refresh(self, step: int) -> bool:
        """Whether new stores have come, which are mixed in from ``step`` on."""
        watch = self.watcher
        if watch is None:
            return False
        last = self._phases[-1]

        def look() -> Phase | None:
            found = {str(store.path): len(store) for store in watch.new_stores(last.names)}
            first_sample = step * self.builder.settings.batch_size
            if not found or first_sample <= last.first_sample:  # what a resumed run repeats is planned already
                return None
            phase = last.with_stores(first_sample, found)
            append_phase(self.phases_file, phase)
            return phase

        phase = self.world.run_on_main(look)
        if phase is None:
            return False
        self._apply_phases([*self._phases, phase])
        for name in phase.names[len(last.names) :]:
            log_main(f"\nfrom step {step} on {name} is mixed in", self.world)
        return True

    def _initial_phases(self, step: int) -> list[Phase]:
        """The phases of the run: those in its ledger, or of a new one that is written."""
        if step == 0 and self.phases_file.exists():
            self.phases_file.unlink()  # of a run that never saved itself
        phases = read_phases(self.phases_file)
        if not phases:
            append_phase(self.phases_file, self._first)
            return [self._first]
        check_same_start(phases, self._first)
        return phases

    def _apply_phases(self, phases: list[Phase]) -> None:
        """Go by ``phases``, opening what stores they have beyond those that are open."""
        for name in phases[-1].names[len(self._store.stores) :]:
            self._store = self._store.with_store(self.open_store(name))
        self._store.check_sizes(phases[-1])
        self._phases = phases

    def close(self) -> None:
        """Let go of the stores' files."""
        for store in self._store.stores:
            store.close()
