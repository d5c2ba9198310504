"""Records of a result file: the manifest with its parts, values, items and curves (`manifest.write_result`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PromptsRecord:
    """Prompts: the SHA-256 of their lines, joined by newlines, and their number (`hash_prompts`)."""

    sha256: str
    count: int


@dataclass(frozen=True, kw_only=True)
class SetRecord:
    """A set of pictures or texts: a name for people, the SHA-256 of its content and its size (`hash_set`)."""

    name: str
    sha256: str
    count: int


@dataclass(frozen=True, kw_only=True)
class ResizeRecord:
    """How pictures get their size.

    Attributes:
        side: Pixels of a side.
        filter: Such as "bicubic" or "lanczos"; "none" without resizing.
        antialias: Whether the filter widens where it makes pictures smaller.
        fit: How a picture becomes a square: "crop", "pad" or "stretch"; "none" without resizing.
    """

    side: int
    filter: str
    antialias: bool
    fit: str = "none"


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """A network that measures: its name, the SHA-256 of its weights, its dimensions, and a label to print."""

    name: str
    sha256: str
    dimensions: int
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class BlurRecord:
    """A Gaussian blur before measuring: sigma in pixels, and of which pictures, "both" or "reference"."""

    sigma: float
    which: str


@dataclass(frozen=True, kw_only=True)
class SelectionRecord:
    """The choice of one of ``candidates`` results of an item, by a score such as "log p(text | picture)" or "none"."""

    candidates: int
    by: str


@dataclass(frozen=True, kw_only=True)
class SeedsRecord:
    """Random seeds: the first one, and how many follow each other."""

    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """A LoRA adapter: its name, the SHA-256 of its files, and its scale."""

    name: str
    sha256: str
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model (`model_record.describe_model`).

    Attributes:
        name: Name of the model, or of its folder.
        sha256: Of config, tokenizers and weights; None for a model that was never in a folder.
        adapters: Adapters that were added.
        weights: Format of the weights, such as "float32" or "int4".
        dtype: Number format of activations.
        kv_dtype: Number format of keys and values.
        guidance: Classifier-free guidance; None where nothing was generated, or where ``sampling`` has it.
        speculative: Maximum number of codes that a forward pass drafts; 1 for none, None for a number by measurement.
    """

    name: str
    sha256: str | None
    adapters: tuple[AdapterRecord, ...] = ()
    weights: str = "float32"
    dtype: str = "float32"
    kv_dtype: str = "auto"
    guidance: float | None = None
    speculative: int | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """How a result was measured. Fields that a measure does not use are None, and are not written.

    Attributes:
        measure: Name of the measure, such as "images" or "scenes".
        prompts: Prompts or captions.
        reference: True pictures or texts.
        candidate: What is measured. Two results may differ in it, but not in its size.
        resize: Resizing of pictures.
        network: Feature network.
        blur: Blur of pictures.
        selection: Choice among several results of an item.
        seeds: Random seeds.
        sampling: Sampling settings.
        model: The model. Two results may differ in it.
        settings: Whatever else moves the values, as plain data.
        versions: Versions of packages; not compared.
        hardware: Processor, threads and device; not compared.
    """

    measure: str
    prompts: PromptsRecord | None = None
    reference: SetRecord | None = None
    candidate: SetRecord | None = None
    resize: ResizeRecord | None = None
    network: NetworkRecord | None = None
    blur: BlurRecord | None = None
    selection: SelectionRecord | None = None
    seeds: SeedsRecord | None = None
    sampling: dict[str, Any] | None = None
    model: ModelRecord | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ResultValue:
    """A measured value.

    Attributes:
        value: The value.
        low: Lower end of its 95% interval, if known.
        high: Upper end.
        n: Number of items that it is measured on.
        unit: Such as "dB" or "bits"; "fraction" is printed in percent.
        higher_is_better: None where neither is, as for an entropy.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int
    unit: str = ""
    higher_is_better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ResultItems:
    """Values of single items, of which a paired comparison is made.

    Attributes:
        ids: Identifiers of the items, each once.
        values: By name of a result, a value for each item; None for an item that the result does not count. The result
            must be the mean of the others, since a comparison resamples that: leave out results that are not means.
        pictures: Picture file of each item, relative to the folder of the result; empty without pictures.
        labels: A text of each item to show, such as its caption; empty without.
    """

    ids: list[str]
    values: dict[str, list[float | None]]
    pictures: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("an id is given twice")
        lengths = {name: len(values) for name, values in self.values.items()}
        lengths |= {name: len(getattr(self, name)) for name in ("pictures", "labels") if getattr(self, name)}
        for name, length in lengths.items():
            if length != len(self.ids):
                raise ValueError(f"{name} has {length} items, there are {len(self.ids)} ids")


@dataclass(frozen=True, kw_only=True)
class ResultCurve:
    """A curve: values over, say, the number of candidates; ``low`` and ``high`` bound a band, if given."""

    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    x_label: str = ""
    y_label: str = ""

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y)} | {len(each) for each in (self.low, self.high) if each}
        if len(lengths) > 1 or not self.x:
            raise ValueError("a curve needs as many values y as x, and at least one")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The content of a result file.

    Attributes:
        manifest: How it was measured.
        results: Values by name.
        items: Values of single items.
        curves: Curves by name.
        sha256: Hash of all the rest.
    """

    manifest: Manifest
    results: dict[str, ResultValue]
    items: ResultItems | None = None
    curves: dict[str, ResultCurve] = field(default_factory=dict)
    sha256: str
