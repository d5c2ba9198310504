"""Which tasks the rows of a token store can train."""

from __future__ import annotations

from collections.abc import Collection

from cogview.tokenizers.tasks import INSTRUCTION_FIELD, SOURCE_FIELD, TASKS, trained_tasks


def tasks_of_store(fields: Collection[str]) -> tuple[str, ...]:
    """Return the names of the tasks that rows with ``fields`` can train, for the header of a store.

    Tasks that fill are not among them: what feeds generation feeds them too (``feeds``). The texts of rows that have a
    source and no instruction are instructions, and describe no image.
    """
    found = [task for task in map(TASKS.__getitem__, trained_tasks()) if set(task.store_fields) <= set(fields)]
    if SOURCE_FIELD in fields and INSTRUCTION_FIELD not in fields:
        found = [task for task in found if SOURCE_FIELD in task.store_fields]
    return tuple(task.name for task in found if not task.fills)


def feeds(tasks: Collection[str], name: str) -> bool:
    """Return whether a store whose header lists ``tasks`` can train the task ``name``."""
    return name in tasks or (name in TASKS and TASKS[name].fills and "generate" in tasks)
