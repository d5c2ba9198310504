"""Checkpoints and adapters on the Hugging Face Hub.

The library ``huggingface_hub`` does the transfers and keeps the cache, so its settings apply: ``HF_HOME`` and
``HF_HUB_CACHE`` (cache), ``HF_ENDPOINT`` (server), ``HF_TOKEN`` or ``hf auth login`` (access), ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogview import __version__
from cogview.errors import InputError, RetryLaterError, reason_of
from cogview.plain_data import read_json

# The files that are fetched and pushed. Pickles and training states are not among them.
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "text.model",
    "image/config.json",
    "image/model.safetensors",
    "things.json",
    "grammar.json",
    "README.md",
    "LICENSE",
)
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "cogview.json",
    "README.md",
    "LICENSE",
)
CARD_IMAGES = ("*.png", "*.jpg")  # pushed as well: the model card shows them

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LOG_IN = "run hf auth login or set HF_TOKEN"


def is_hub_name(name: str) -> bool:
    """Return whether ``name`` has the form owner/name."""
    return _HUB_NAME.fullmatch(name) is not None


def fetch_checkpoint(name: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Fetch a checkpoint from the Hub, or from the cache if nothing has changed.

    Args:
        name: The repository, as owner/name.
        revision: A branch, a tag or a commit; ``main`` by default.
        cache_dir: The cache; that of ``huggingface_hub`` by default.

    Returns:
        The checkpoint folder, inside the cache. Do not change its files.

    Raises:
        InputError: The repository or revision does not exist, access is denied, it is no checkpoint of this toolkit,
            or it is not in the cache and the Hub cannot be reached.
    """
    # The config first: the repository may hold gigabytes of another kind of model.
    commit, path = _fetch_config(name, "config.json", "CogView checkpoint", revision, cache_dir)
    config = read_json(path)
    if not isinstance(config, dict) or "format_version" not in config:
        raise InputError(f"{name} is no CogView checkpoint: its config.json has no format_version")
    return _fetch_files(name, CHECKPOINT_FILES, commit, cache_dir)


def fetch_adapter(name: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Fetch a LoRA adapter from the Hub, or from the cache.

    Args:
        name: ``owner/name``.
        revision: branch, tag or commit; None takes the main branch.
        cache_dir: cache folder; None takes that of ``huggingface_hub``.

    Returns:
        The folder of the adapter in the cache.

    Raises:
        InputError: as ``fetch_checkpoint``.
    """
    commit, _ = _fetch_config(name, "adapter_config.json", "LoRA adapter", revision, cache_dir)
    return _fetch_files(name, ADAPTER_FILES, commit, cache_dir)


def push_folder(
    folder: Path,
    name: str,
    *,
    revision: str | None = None,
    private: bool = False,
    commit_message: str | None = None,
) -> str:
    """Push a checkpoint or adapter folder to the Hub as one commit.

    The repository and the branch are created if needed. The model card ``README.md`` is pushed unchanged.

    Args:
        folder: A checkpoint or adapter folder; only its known files are pushed.
        name: The repository, as owner/name.
        revision: The branch; ``main`` by default.
        private: Whether a new repository is private. An existing one keeps its visibility.
        commit_message: By default, "Upload FOLDER with cogview VERSION".

    Returns:
        The address of the commit.

    Raises:
        InputError: The folder is incomplete or damaged, the name is malformed, access is denied, or the Hub cannot be
            reached.
    """
    files = _files_to_push(folder)
    if not is_hub_name(name):
        raise InputError(f'"{name}" is no name on the Hub: expected owner/name')
    from huggingface_hub import CommitOperationAdd, HfApi

    message = commit_message or f"Upload {folder.resolve().name} with cogview {__version__}"
    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in files]
    with _errors_as_input_errors(name, revision, "pushed to"):
        api = HfApi(library_name="cogview", library_version=__version__)
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.create_commit(name, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def _files_to_push(folder: Path) -> list[str]:
    """Return the names of the files of a checkpoint or adapter; raise InputError if they are incomplete or damaged."""
    import torch

    from cogview.checkpoints.adapter import Adapter
    from cogview.checkpoints.checkpoint import load_model
    from cogview.checkpoints.precision import Precision, convert
    from cogview.checkpoints.safetensors_io import WeightsFile

    names: tuple[str, ...] = CHECKPOINT_FILES
    if (folder / "adapter_config.json").is_file():
        Adapter(folder).check_finite()
        names = ADAPTER_FILES
    else:
        load_model(folder, torch.device("cpu"), torch.float32, meta_only=True)
        for _ in convert(WeightsFile(folder / "model.safetensors"), Precision()):
            pass  # reading checks the numbers
    images = sorted(path.name for pattern in CARD_IMAGES for path in folder.glob(pattern))
    return [name for name in names if (folder / name).is_file()] + images


def _fetch_config(
    name: str, file: str, kind: str, revision: str | None, cache_dir: str | Path | None
) -> tuple[str, Path]:
    """Fetch the config, which shows the kind of a repository; return the commit and the path of the config."""
    folder = _fetch_files(name, (file,), revision, cache_dir, hide_progress=True)
    if not (folder / file).is_file():
        raise InputError(f"{name} is no {kind}: it has no {file}")
    return folder.name, folder / file


def _fetch_files(
    name: str,
    files: Sequence[str],
    revision: str | None,
    cache_dir: str | Path | None,
    hide_progress: bool | None = None,
) -> Path:
    """Fetch those of ``files`` that the repository has; by default, progress is shown on a terminal alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "disable": hide_progress})  # type: ignore[no-untyped-call]

    with _errors_as_input_errors(name, revision, "fetched from", cache_dir):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=list(files),
                tqdm_class=Bar,
                library_name="cogview",
                library_version=__version__,
            )
        )


@contextmanager
def _errors_as_input_errors(
    name: str, revision: str | None, verb: str, cache_dir: str | Path | None = None
) -> Iterator[None]:
    """Turn every error of ``huggingface_hub`` into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, _http_error(), ValueError, RuntimeError) as error:  # RuntimeError: from hf_xet
        reason = _explain(error, name, revision, cache_dir)
        if not reason:
            from huggingface_hub.constants import ENDPOINT

            reason = f"{name} cannot be {verb} {ENDPOINT}: {reason_of(error)}"
        raise InputError(" ".join(reason.split())) from None


def _explain(error: Exception, name: str, revision: str | None, cache_dir: str | Path | None) -> str:
    """Describe an error and its remedy; empty if it is not a known one.

    Raises:
        RetryLaterError: The Hub cannot be reached.
    """
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    absent = ""
    if isinstance(error, errors.LocalEntryNotFoundError):
        absent = f"{name} is not (completely) in the cache {cache_dir or constants.HF_HUB_CACHE}, and "
        error = error.__cause__ if isinstance(error.__cause__, Exception) else errors.OfflineModeIsEnabled()
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{absent}HF_HUB_OFFLINE is set: unset it and run the command again"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: request access at {endpoint}/{name}, then {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is neither a local folder nor a model at {endpoint}; if it is private, {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: expected a branch, a tag or a commit"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        message = error.server_message or error.response.reason_phrase
        return f"{endpoint} answered {status} for {name}: {message}" + (f"; {_LOG_IN}" if status in (401, 403) else "")
    if isinstance(error, (_http_error(), ConnectionError, TimeoutError)):
        reason = f"{absent}{endpoint} cannot be reached ({reason_of(error)}): check the network and HF_ENDPOINT"
        raise RetryLaterError(" ".join(reason.split())) from None
    return ""


def _http_error() -> type[Exception]:
    """Return the base error of the HTTP library, which is another one in each major version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base
