"""Known models: the rows of ``checkpoints.yaml``, and where each of them lies on this machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from cogview.checkpoints.hub import fetch_adapter, fetch_checkpoint, is_hub_name
from cogview.config_io import from_mapping
from cogview.errors import InputError
from cogview.plain_data import read_yaml
from cogview.process_variables import folder_variable

V1_FILES = {  # by role, under their published names
    "transformer": "cogview-base.tar",
    "image_tokenizer": "vqvae_hard_biggerset_011.pt",
    "text_model": "cog-pretrain.model",
}
ROLES = tuple(V1_FILES)  # in the order in which `convert` takes them


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A released file: its name, the mirrors that have it, best first, and the page where a person finds it."""

    name: str
    urls: tuple[str, ...]
    page: str
    size: int | None = None  # bytes
    sha256: str | None = None

    def __post_init__(self) -> None:
        for url in self.urls:
            if not url.startswith(("https://", "http://")):
                raise ValueError(f"{url} is no address of a file: http and https are understood")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One row, with exactly one of ``embedded``, ``files`` and ``parts``."""

    about: str
    licence: str
    tasks: tuple[str, ...] = ()  # of a bundle: those of its parts
    embedded: str = ""  # a checkpoint folder, relative to the package
    sha256: dict[str, str] = field(default_factory=dict)  # of the files in ``embedded``
    files: dict[str, FileEntry] = field(default_factory=dict)  # of a released model, by role
    parts: dict[str, str] = field(default_factory=dict)  # of a bundle: task -> row

    def __post_init__(self) -> None:
        if sum(map(bool, (self.embedded, self.files, self.parts))) != 1:
            raise ValueError("exactly one of embedded, files and parts must be given")
        if self.files and set(self.files) != set(ROLES):
            raise ValueError(f"files must be those of {', '.join(ROLES)}, got {', '.join(self.files)}")
        if self.parts:
            object.__setattr__(self, "tasks", tuple(self.parts))

    @property
    def models(self) -> tuple[str, ...]:
        """The rows that a bundle is made of, each once."""
        return tuple(dict.fromkeys(self.parts.values()))


def load_registry() -> dict[str, ModelEntry]:
    """The rows of checkpoints.yaml by name."""
    rows = read_yaml(_package() / "checkpoints.yaml") or {}
    return {name: from_mapping(ModelEntry, row, where=f"checkpoints.yaml, {name}") for name, row in rows.items()}


def resolve_checkpoint(name: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a checkpoint, fetched from the Hugging Face Hub if needed.

    Args:
        name: A checkpoint folder, a model of the registry, or owner/name of a model on the Hub; the first that exists.
            The files of a model inside the package are verified.
        revision: Of a model on the Hub: a branch, a tag or a commit.
        cache_dir: For models of the Hub; the cache of ``huggingface_hub`` by default.

    Returns:
        The checkpoint folder.

    Raises:
        InputError: The name is unknown, a bundle (see ``resolve_bundle``) or a CogView v1 checkpoint that is not
            converted; the model is not on this machine or cannot be fetched; a revision was given for another model
            than one of the Hub.
    """
    known = load_registry()
    if not name.strip():
        raise InputError(
            f"the name of the model is empty; known: {', '.join(known)}, the path of a checkpoint folder, or owner/"
            "name on the Hugging Face Hub"
        )
    row = None if _is_checkpoint(Path(name)) else known.get(name)
    if revision is not None and (row is not None or Path(name).exists() or not is_hub_name(name)):
        raise InputError(
            f"the revision {revision} applies to models of the Hugging Face Hub (owner/name), not to {name}"
        )
    if row is None:
        return _find_folder(name, known, revision, cache_dir)
    if row.embedded:
        from cogview.checkpoints.checkpoint import verify_files

        folder = embedded_folder(row)
        verify_files(folder, list(row.sha256.items()))
        return folder
    if row.parts:
        raise InputError(f"{name} stands for several models: name one of {', '.join(row.models)}")
    if is_converted(name):
        return converted_folder(name)
    files = {role: file.name for role, file in row.files.items()}
    raise InputError(
        f"{name} is known, but not on this machine: cogview download {name}, or, with its files at hand: "
        f"{convert_command(files)}"
    )


def resolve_bundle(name: str) -> dict[str, Path]:
    """Task -> checkpoint folder for those models of the bundle ``name`` that are on this machine; else empty.

    Raises InputError for a bundle none of whose models is here.
    """
    row = None if _is_checkpoint(Path(name)) else load_registry().get(name)
    if row is None or not row.parts:
        return {}
    found = {task: converted_folder(part) for task, part in row.parts.items() if is_converted(part)}
    if not found:
        raise InputError(
            f"{name} is known, but none of its models ({', '.join(row.models)}) is on this machine: "
            f"cogview download {name}"
        )
    return found


def resolve_adapter(name: str | Path) -> Path:
    """Return the folder of an adapter: ``name`` itself, or, for owner/name, that of the Hub in the cache."""
    path = Path(name)
    if is_hub_name(path.as_posix()) and not path.is_dir():
        check_local_path(path)
        return fetch_adapter(path.as_posix())
    return path


def cache_folder() -> Path:
    """Where downloaded files and converted models lie: $COGVIEW_HOME, $XDG_CACHE_HOME/cogview or ~/.cache/cogview."""
    if (chosen := folder_variable("COGVIEW_HOME")) is not None:
        return chosen
    return (folder_variable("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "cogview"


def downloads_folder() -> Path:
    """Where released files go."""
    return cache_folder() / "files"


def converted_folder(name: str) -> Path:
    """The checkpoint folder that the released model ``name`` is converted into; it need not exist."""
    return cache_folder() / "models" / name


def is_converted(name: str) -> bool:
    """Whether the released model ``name`` is on this machine as a checkpoint folder."""
    return (converted_folder(name) / "config.json").is_file()


def embedded_folder(row: ModelEntry) -> Path:
    """The folder of a model inside the package, as it is."""
    return _package() / row.embedded


def is_v1(path: Path) -> bool:
    """Whether ``path`` looks like an archive, a file or a folder of released weights."""
    if path.is_dir():
        return any(
            (path / name).is_file() for name in ("latest_checkpointed_iteration.txt", "mp_rank_00_model_states.pt")
        )
    return path.suffix in (".tar", ".pt") and path.is_file()


def convert_command(files: Mapping[str, str | Path]) -> str:
    """What to type to convert a released model from its files, by role; those not given go by their released names."""
    files = {**V1_FILES, **files}
    transformer, image_tokenizer, text_model = (shlex.quote(str(files[role])) for role in ROLES)
    return f"cogview convert {transformer} --image-tokenizer {image_tokenizer} --text-model {text_model}"


def _is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is a checkpoint folder, which wins over a known name."""
    return (path / "config.json").is_file()


def _find_folder(
    name: str, known: Mapping[str, ModelEntry], revision: str | None, cache_dir: str | Path | None
) -> Path:
    """Return the local folder ``name``, or that of a model on the Hub in the cache."""
    path = Path(name)
    if is_v1(path):
        if _is_image_tokenizer(path):
            raise InputError(
                f"{name} is the image tokenizer of released checkpoints, which belongs behind --image-tokenizer: "
                f"{convert_command({'image_tokenizer': name})}"
            )
        raise InputError(
            f"{name} is a released checkpoint, which has to be converted once: {convert_command({'transformer': name})}"
        )
    if path.is_dir():
        return path
    if path.is_file():
        check_local_path(path)
    if is_hub_name(name):
        if revision is None:  # which models of the Hub alone have
            check_local_path(path)
        return fetch_checkpoint(name, revision=revision, cache_dir=cache_dir)
    raise InputError(
        f'checkpoint "{name}" is unknown; known: {", ".join(known)}, the path of a checkpoint folder, or owner/name on '
        "the Hugging Face Hub"
    )


def check_local_path(path: Path) -> None:
    """Raise InputError for a path in an existing folder that no folder has: the Hub is not meant.

    Args:
        path: A path that has the form owner/name of the Hub and is no folder.
    """
    parent = path.parent
    if path.is_file():
        raise InputError("; ".join([f"{path} is a file, expected the folder of a checkpoint", *_remedies(parent)]))
    if parent.is_dir():
        problem = f"no such folder: {path} (the Hugging Face Hub is not asked, since {parent} is a folder here)"
        raise InputError("; ".join([problem, *_remedies(parent)]))


def _remedies(work: Path) -> list[str]:
    """Return how to get a model out of the work folder of a recipe; none for another folder."""
    recipe, found = work / "recipe.yaml", sorted((work / "transformer-run" / "checkpoints").glob("step-*"))
    ways = [f"the newest checkpoint can be used: {found[-1]}"] if found else []
    return ways + ([f"the model is finished by cogview run {recipe}"] if recipe.is_file() else [])


def _is_image_tokenizer(path: Path) -> bool:
    """Whether a released file holds one; what cannot be read is left to ``cogview convert`` to judge."""
    if path.suffix != ".pt" or not path.is_file():
        return False
    from cogview.checkpoints.v1_vqvae import is_v1_vqvae

    with suppress(InputError):
        return is_v1_vqvae(path)
    return False


def _package() -> Path:
    return Path(str(resources.files("cogview")))
