"""Bound the memory and time of a pickle before it is read.

A pickle of 300 bytes may build tuples of tuples whose hash takes years, and ten bytes may ask for a memo of gigabytes.
``bounded_pickle`` walks through the opcodes with sizes in place of values and refuses such a file.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from io import BytesIO
from typing import IO, Any

from cogview.formatting import printable

MAX_BYTES = 1 << 27  # of a pickle without the numbers of its tensors
MAX_OPCODES = 2_000_000  # the pickles of CogView v1 have some ten thousand
MAX_DEPTH = 100  # of tuples and containers in each other

MAX_WORK = 10 * MAX_OPCODES  # values put into others
MAX_LONG = 1000  # integers of more than 64 bits; the layout before the zip archive has one

_EMPTY = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # change the container below their values
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


class _Size:
    """Number of values in a value of a pickle, repeated ones counted anew, and its depth."""

    __slots__ = ("count", "depth")

    def __init__(self) -> None:
        self.count, self.depth = 1, 0


_SCALAR = _Size()
_MARK = _Size()  # on the stack, below the values of a container


class _Window:
    """The next ``MAX_BYTES`` of a file, which gives out no more than it has."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        start = file.tell()
        self._left = min(MAX_BYTES, file.seek(0, 2) - start)
        file.seek(start)

    def read(self, count: int) -> bytes:
        return self._taken(self._file.read(min(count, self._left)))

    def readline(self) -> bytes:
        return self._taken(self._file.readline(self._left))

    def tell(self) -> int:
        return self._file.tell()

    def _taken(self, content: bytes) -> bytes:
        self._left -= len(content)
        return content


def bounded_pickle(file: IO[bytes]) -> BytesIO:
    """Return the pickle that begins at the position of ``file``, and move the position behind it.

    Args:
        file: The open file.

    Returns:
        The bytes of the pickle, which take a bounded time and memory to unpickle.

    Raises:
        pickle.UnpicklingError: The pickle is damaged, too long, or would take a time or memory without bound.
    """
    start = file.tell()
    try:
        _Walk().run(_Window(file))
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise pickle.UnpicklingError(f"its pickle is damaged: {printable(str(error))[:80]}") from None
    end = file.tell()
    file.seek(start)
    return BytesIO(file.read(end - start))


class _Walk:
    """The execution of a pickle's opcodes with sizes in place of values."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, _Size] = {}
        self._work = 0  # values that have been put into others, repeated ones counted anew

    def run(self, file: _Window) -> None:
        """Execute the opcodes up to the end of the pickle; raise UnpicklingError beyond a limit."""
        stack, memo, num_long = self._stack, self._memo, 0
        argument: Any
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file), start=1):  # type: ignore[arg-type]
            if number > MAX_OPCODES:
                raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} opcodes")
            name = opcode.name
            if name in _PUTS:
                if argument > number:  # picklers number the memo from 0
                    raise pickle.UnpicklingError("it asks for a memo beyond its values")
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in _GETS:
                stack.append(memo[argument])
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "DUP":
                stack.append(stack[-1])
            else:
                self._apply(name, opcode.stack_before, opcode.stack_after)
                num_long += isinstance(argument, int) and abs(argument) >= 1 << 64
                if num_long > MAX_LONG:  # integers of equal hashes would make a dictionary slow
                    raise pickle.UnpicklingError("it has too many integers of more than 64 bits")

    def _apply(self, name: str, before: list[Any], after: list[Any]) -> None:
        """Replace the arguments of an opcode on the stack by its result."""
        if not before:
            self._stack.extend([_Size() if name in _EMPTY else _SCALAR] * len(after))
            return
        parts: list[_Size] = []
        if pickletools.markobject in before:
            while (part := self._stack.pop()) is not _MARK:
                parts.append(part)
            before = before[: before.index(pickletools.markobject)]
        parts += [self._stack.pop() for _ in before]
        if _MARK in parts:
            raise pickle.UnpicklingError("a mark is in place of a value")
        result = parts.pop() if name in _FILLS else _SCALAR
        result = _Size() if result is _SCALAR else result
        for part in parts:
            result.count += part.count
            result.depth = max(result.depth, part.depth + 1)
            self._work += part.count
        if result.count > MAX_OPCODES or result.depth > MAX_DEPTH or self._work > MAX_WORK:
            raise pickle.UnpicklingError("its values are repeated or nested without end")
        self._stack.extend(result for _ in after)
