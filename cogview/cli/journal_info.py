"""``cogview info OUTPUT/NAME.ledger.jsonl``: the settings, results and errors of a job."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cogview.formatting import printable

MAX_ERRORS = 20  # that are listed


def journal_facts(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the facts of a job's journal by name, and a line for each error.

    Args:
        path: The journal.

    Raises:
        InputError: The file is not a journal.
    """
    from cogview.jobs.journal import read_journal

    header, outcomes = read_journal(path)
    counts = Counter(str(facts.get("task", "unknown")) for facts in outcomes.done.values())
    tasks = ", ".join(f"{task} {count}" for task, count in counts.items())
    facts = {
        "journal": str(path),
        "model": f"{header.get('model')}",
        "device": ", ".join(str(header.get(key)) for key in ("device", "dtype")),
        "seed": f"{header.get('seed')}",
        "batch": f"{header.get('batch')}",
        "results": f"{len(outcomes.done)}" + (f": {tasks}" if tasks else ""),
        "failed": f"{len(outcomes.errors)}",
    }
    errors = [f"{name}: {error['error']}" for name, error in outcomes.errors.items()]
    more = [f"and {len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
    return {key: printable(value) for key, value in facts.items()}, list(map(printable, errors[:MAX_ERRORS])) + more
