"""Results and messages as lines of JSON, for services: the option ``--json``.

With the option, stderr is a stream that writes an object per line, whatever part of the toolkit writes to it::

    {"info": "cogview-emoji on cpu, float32 (no GPU is used), seed 3"}
    {"note": "“两只狸子”: it names none of the things that the model was trained on"}
    {"failed": "image a.png cannot be read: …", "file": "a.png"}
    {"error": "the disk is full; …", "status": 3}

The first key is one of ``KINDS``, or ``info``, or ``error`` for the message that ends the command, with its exit
status. Results are objects on stdout. A stream that is no terminal shows no progress bars.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from cogview.cli.translation import translate

KINDS = ("note", "warning", "skipped", "failed", "stopped")

_KIND = re.compile(rf"({'|'.join(KINDS)}): (.*)", re.IGNORECASE | re.DOTALL)


class JsonLines:
    """A stream that turns the lines of text that are written to it into lines of JSON."""

    def __init__(self, stream: Any) -> None:
        """Write to ``stream``, a text file or a ``TranslatedStream``; the messages are translated as there."""
        self.catalogue = getattr(stream, "catalogue", None)
        self._stream = stream if self.catalogue is None else stream.untranslated
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        """Pass everything else to the stream."""
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Return False: nothing that rewrites a line, such as a progress bar, may be shown."""
        return False

    def as_line(self, message: str) -> str:
        """Return a message as ``write`` would write it, for a handler of signals, which may not print."""
        return _encode({"info": translate(message)}, self._stream)

    def write(self, text: str) -> int:
        """Write each line of ``text`` that is complete; the rest waits for its end."""
        *lines, self._line = (self._line + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                self.write_message(line)
        return len(text)

    def write_message(self, line: str, **facts: Any) -> None:
        """Write one message, such as ``note: the seed is random``, with further ``facts``."""
        match = _KIND.fullmatch(line)
        kind, message = (match[1].lower(), match[2]) if match else ("info", line)
        self.write_object({kind: message, **facts})

    def write_object(self, content: Mapping[str, Any]) -> None:
        """Write one object; its first value, a message, is translated."""
        (kind, message), *facts = content.items()
        self._stream.write(_encode({kind: translate(message), **dict(facts)}, self._stream) + "\n")
        self._stream.flush()


@contextlib.contextmanager
def json_lines(active: bool) -> Iterator[None]:
    """Write lines of JSON to stderr within the block, if ``active``."""
    if not active:
        yield
        return
    before = sys.stderr
    sys.stderr = lines = JsonLines(before)
    try:
        yield
        lines.write("\n")  # the end of a line that has none
    finally:
        sys.stderr = before


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line contains ``--json`` before ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return "--json" in arguments[:end]


def is_json() -> bool:
    """Return whether the running command writes lines of JSON."""
    return isinstance(sys.stderr, JsonLines)


def print_error(program: str, message: str, status: int) -> None:
    """Print the message that ends a command on stderr.

    Args:
        program: The command, which the line of text starts with.
        message: One line.
        status: The exit status, which the object of JSON holds.
    """
    if isinstance(sys.stderr, JsonLines):
        sys.stderr.write_object({"error": message, "status": int(status)})
    else:
        print(f"{program}: {message}", file=sys.stderr)


def print_message(kind: str, message: str, **facts: Any) -> None:
    """Print a message on stderr, without breaking a progress bar.

    Args:
        kind: One of ``KINDS``.
        message: One line.
        **facts: Further keys of the object of JSON.
    """
    from tqdm import tqdm

    if isinstance(sys.stderr, JsonLines):
        sys.stderr.write_message(f"{kind}: {message}", **facts)
    else:
        tqdm.write(f"{kind}: {message}", file=sys.stderr)


def print_note(note: str) -> None:
    """Print a note on stderr, without breaking a progress bar."""
    print_message("note", note)


def print_result(line: str, facts: Mapping[str, Any]) -> None:
    """Print a result on stdout at once, without breaking a progress bar.

    Args:
        line: The line of text.
        facts: The object of JSON; keys whose value is None are left out.
    """
    from tqdm import tqdm

    known = {key: value for key, value in facts.items() if value is not None}
    tqdm.write(_encode(known, sys.stdout) if is_json() else line, file=sys.stdout)
    sys.stdout.flush()


def _encode(content: Mapping[str, Any], stream: TextIO) -> str:
    """Return an object as a line; in ASCII where the stream has no Unicode, whose escapes JSON does not have."""
    is_unicode = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
    return json.dumps(content, ensure_ascii=not is_unicode)
