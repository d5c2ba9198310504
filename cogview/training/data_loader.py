"""The batches of a run from its stores, to which new ones may come while it is going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cogview.data.mixture import (
    MixedStore,
    Mixture,
    Phase,
    StoreWatch,
    append_phase,
    check_same_start,
    read_phases,
)
from cogview.data.store import TokenStore
from cogview.errors import InputError
from cogview.training.distributed import World, tell
from cogview.training.examples import Batch, Lectures, LessonMaker


class Supply:
    """What the loop asks for batches.

    ``stores``, by the names that the recipe has for them, are mixed by ``shares``. The file ``ledger`` says which
    stores are mixed from which sample on, so that a resumed run repeats what it was, whatever stores there are by then.
    ``watch`` looks for new ones, which ``open_store`` opens by name.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        shares: Sequence[float],
        ledger: Path,
        maker: LessonMaker,
        world: World,
        *,
        watch: StoreWatch | None = None,
        open_store: Callable[[str], TokenStore] = TokenStore,
        num_threads: int = 1,
        micro_batch: int = 0,
    ) -> None:
        self.maker = maker
        self.world = world
        self.ledger = ledger
        self.watch = watch
        self.open_store = open_store
        self.num_threads = num_threads
        self.micro_batch = micro_batch
        size = maker.settings.batch_size
        if size % world.size:
            near = size - size % world.size
            raise InputError(
                f"batch_size {size} does not divide among {world.size} processes; {near or world.size} or "
                f"{near + world.size} would"
            )
        self._store = MixedStore(list(stores.values()))
        self._first = Phase(
            first_sample=0, names=tuple(stores), shares=tuple(shares), sizes=tuple(map(len, stores.values()))
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

    def batches(self, step: int) -> Iterator[Batch]:
        """Those of ``step`` and all after it, of the rows of this process."""
        if not self._phases:
            self._take(self.world.on_first(lambda: self._begin(step)))
        lectures = Lectures(
            self._store,
            Mixture(self._phases, self.maker.settings.seed),
            self.maker,
            self.world,
            shares=self.num_threads,
            micro_batch=self.micro_batch,
        )
        return lectures.from_step(step)

    def renew(self, step: int) -> bool:
        """Whether new stores have come, which are mixed in from ``step`` on."""
        watch = self.watch
        if watch is None:
            return False
        last = self._phases[-1]

        def look() -> Phase | None:
            found = {str(store.path): len(store) for store in watch.new_stores(last.names)}
            first_sample = step * self.maker.settings.batch_size
            if not found or first_sample <= last.first_sample:  # what a resumed run repeats is planned already
                return None
            phase = last.with_stores(first_sample, found)
            append_phase(self.ledger, phase)
            return phase

        phase = self.world.on_first(look)
        if phase is None:
            return False
        self._take([*self._phases, phase])
        for name in phase.names[len(last.names) :]:
            tell(f"\nfrom step {step} on {name} is mixed in", self.world)
        return True

    def _begin(self, step: int) -> list[Phase]:
        """The phases of the run: those in its ledger, or of a new one that is written."""
        if step == 0 and self.ledger.exists():
            self.ledger.unlink()  # of a run that never saved itself
        phases = read_phases(self.ledger)
        if not phases:
            append_phase(self.ledger, self._first)
            return [self._first]
        check_same_start(phases, self._first)
        return phases

    def _take(self, phases: list[Phase]) -> None:
        """Go by ``phases``, opening what stores they have beyond those that are open."""
        for name in phases[-1].names[len(self._store.stores) :]:
            self._store = self._store.with_store(self.open_store(name))
        self._store.check_sizes(phases[-1])
        self._phases = phases

    def close(self) -> None:
        """Let go of the stores' files."""
        for store in self._store.stores:
            store.close()
