"""A recipe: one YAML file with a section per step, and the work folder in which each step finds the earlier results."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from cogview.config_io import from_mapping, read_recipe, section
from cogview.errors import InputError
from cogview.input_files import looked_at
from cogview.process_variables import is_first_process

if TYPE_CHECKING:
    from cogview.tokenizers.text import TextTokenizer
    from cogview.vqvae.model import VQVAE

PACKAGED = Path(__file__).parents[1] / "recipes"
MAX_WARMUP_SHARE = 0.1  # of the steps that an override asks for, unless the recipe itself has a larger share
T = TypeVar("T")


def packaged_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(PACKAGED.glob("*.yaml"))}


def find_recipe(path: Path) -> Path:
    """Return the file of a recipe.

    Args:
        path: A file, or the name of a packaged recipe, such as ``emoji-cpu``. A file of that name comes first.

    Raises:
        InputError: There is neither.
    """
    known = packaged_recipes()
    if path.exists() and not path.is_dir():
        return path
    if str(path) in known:
        return known[str(path)]
    if path.is_dir():
        inside = path / "recipe.yaml"
        advice = f"it holds {inside}" if inside.is_file() else "expected the YAML file of a recipe"
        raise InputError(f"cannot read the recipe {path}: it is a folder; {advice}")
    near = get_close_matches(path.stem, known, n=1)
    remedy = f'did you mean the packaged recipe "{near[0]}"?' if near else f"packaged recipes are: {', '.join(known)}"
    looked = looked_at(path) if path.suffix or len(path.parts) > 1 else ""  # not for a name
    raise InputError(f"cannot read the recipe {path}: No such file or directory; {remedy}{looked}")


@dataclass(frozen=True)
class Recipe:
    """A recipe file with its overrides and its work folder.

    Attributes:
        path: The YAML file.
        sections: Its content.
        overrides: Changes ``key=value`` of the section that a command reads.
        work: Folder of the results.
        overrides_by_section: Changes ``key=value`` of other sections, where a command reads several.
        notes: Notes on settings that were printed, each of them once.
    """

    path: Path
    sections: Mapping[str, Any]
    overrides: tuple[str, ...]
    work: Path
    overrides_by_section: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path, work: Path | None = None, overrides: tuple[str, ...] = ()) -> Recipe:
        """Read a recipe file.

        Args:
            path: The YAML file, or the name of a packaged recipe.
            work: Folder of the results; that of the recipe if None.
            overrides: Changes ``key=value`` of the section that a command reads.

        Returns:
            The recipe.

        Raises:
            InputError: The file cannot be read, or no work folder is given.
        """
        path = find_recipe(path)
        sections = read_recipe(path)
        folder = work or sections.get("work")
        if not isinstance(folder, str | Path):
            raise InputError(f"{path} names no folder for its results: expected work: FOLDER, or give --work")
        return cls(path=path, sections=sections, overrides=overrides, work=Path(folder))

    @property
    def world(self) -> Path:
        """Folder of the emoji world."""
        return self.work / "world"

    @property
    def scene_pictures(self) -> Path:
        """Tar shard of scenes of the emoji world, exported as pictures with captions."""
        return self.work / "scenes.tar"

    @property
    def text_model(self) -> Path:
        """File of the text tokenizer."""
        return self.work / "text.model"

    @property
    def picture_index(self) -> Path:
        """Index of the pictures that the VQ-VAE is trained on."""
        return self.work / "pictures.jsonl"

    @property
    def image_run(self) -> Path:
        """Run folder of the VQ-VAE."""
        return self.work / "image-run"

    @property
    def image_tokenizer(self) -> Path:
        """Folder of the trained VQ-VAE."""
        return self.work / "image"

    @property
    def store(self) -> Path:
        """Token store of the training data."""
        return self.work / "store"

    @property
    def held_out_store(self) -> Path:
        """Token store of the validation data."""
        return self.work / "held-out-store"

    @property
    def transformer_run(self) -> Path:
        """Run folder of the transformer."""
        return self.work / "transformer-run"

    def open_text_tokenizer(self) -> TextTokenizer:
        """Load the text tokenizer.

        Raises:
            InputError: It has not been trained yet.
        """
        from cogview.tokenizers.text import TextTokenizer

        try:
            return TextTokenizer.load(self.text_model)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{error}; make it with: cogview train-text {self.path}") from None

    def open_image_tokenizer(self) -> VQVAE:
        """Load the trained VQ-VAE on the CPU.

        Raises:
            InputError: It has not been trained yet.
        """
        from cogview.checkpoints.image_tokenizer import load_image_tokenizer

        if not self.image_tokenizer.is_dir():
            raise InputError(
                f"there is no image tokenizer at {self.image_tokenizer}; make it with: cogview train-image {self.path}"
            )
        return load_image_tokenizer(self.image_tokenizer)

    def require_held_out_store(self) -> None:
        """Raise InputError where pictures were encoded into a training store, and the held-out one is missing.

        Both are made together: the split into them is part of the training store.
        """
        of_pictures = "pictures" in (self.sections.get("encode") or {})
        if of_pictures and self.store.exists() and not self.held_out_store.exists():
            raise InputError(
                f"{self.store} is there, but the held-out store {self.held_out_store} is missing: encode both anew "
                f"after rm -r {self.store}; of few pictures, hold out a larger share (encode.held_out)"
            )

    def section(self, name: str) -> dict[str, Any]:
        """Return section ``name`` as plain values, with the overrides."""
        return section(self.sections, name, self.overrides_of(name))

    @property
    def named_overrides(self) -> tuple[str, ...]:
        """All overrides of sections, as ``cogview run`` takes them: SECTION.KEY=VALUE."""
        return tuple(f"{name}.{each}" for name, given in self.overrides_by_section.items() for each in given)

    def overrides_of(self, name: str) -> tuple[str, ...]:
        """Return the overrides that apply to section ``name``."""
        return *self.overrides, *self.overrides_by_section.get(name, ())

    def settings(self, kind: type[T], name: str, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> T:
        """Return section ``name`` as the dataclass ``kind``.

        Args:
            kind: The dataclass.
            name: Name of the section.
            defaults: Values of inner sections for keys that the recipe does not have.

        Raises:
            InputError: A key is unknown or missing, or a value is wrong.
        """
        content = self.section(name)
        for key, values in (defaults or {}).items():
            if isinstance(inner := content.get(key) or {}, Mapping):
                content[key] = {**values, **inner}
        self._shorten_warmup(kind, name, content)
        return from_mapping(kind, content, where=f"section {name} of {self.path}")

    def _shorten_warmup(self, kind: type[Any], name: str, content: dict[str, Any]) -> None:
        """Bound the warm-up by ``MAX_WARMUP_SHARE`` of the steps of an override; print a note if it is shortened."""
        overridden = {override.partition("=")[0] for override in self.overrides_of(name)}
        if "training.steps" not in overridden or "training.warmup_steps" in overridden:
            return
        hints = get_type_hints(kind)
        if "training" not in hints:
            return  # the key is unknown, which from_mapping reports
        planned = section(self.sections, name).get("training")
        planned = planned if isinstance(planned, dict) else {}
        warmup = planned.get("warmup_steps", hints["training"].warmup_steps)
        before, steps = planned.get("steps"), content["training"]["steps"]
        numbers = (warmup, before, steps)
        if any(type(number) is not int for number in numbers) or not 0 < warmup < before or steps <= 1:
            return
        share = max(MAX_WARMUP_SHARE, warmup / before)
        shortened = max(1, int(steps * share))
        if shortened >= warmup:
            return
        content["training"]["warmup_steps"] = shortened
        note = f"note: warmup_steps is {shortened}, not {warmup}: at most {share:.0%} of the {steps} steps"
        if note not in self.notes and is_first_process():
            print(note, file=sys.stderr)
        self.notes.add(note)
