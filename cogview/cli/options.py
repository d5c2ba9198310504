"""Options that several commands share, and the click classes behind every command.

Only ``click`` and the standard library are imported here, so that ``--help`` is printed at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import click

from cogview.cli.usage import unknown_command, with_options
from cogview.cli.word_or_count import WordOrCount
from cogview.errors import InputError
from cogview.limits import MAX_RESULTS

DEFAULT_MODEL = "cogview-emoji"
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
KV_DTYPES = ("auto", "int8")
MODEL_HELP = "a name listed by cogview models, a checkpoint folder, or owner/name on the Hugging Face Hub"
MODEL_DEFAULT = "set by the model"  # of sampling options


class FileName(click.Path):
    """The name of a file or folder; an empty one, as of a shell variable without a value, is no name of this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name as a path."""
        if value == "":
            self.fail("the name is empty; expected a file or folder", param, ctx)
        return super().convert(value, param, ctx)


FILE = FileName(path_type=Path)

Decorator: TypeAlias = Callable[[Any], Any]  # of a command's function


class Command(click.Command):
    """A command whose help also describes its arguments, in a section above the options.

    Errors of the library name the options of the command.
    """

    def __init__(self, *arguments: Any, keeps_results: bool = True, **settings: Any) -> None:
        """Create the command.

        Args:
            arguments: Those of click.
            keeps_results: Whether results that are finished remain when the command is interrupted.
            settings: Those of click.
        """
        super().__init__(*arguments, **settings)
        self.keeps_results = keeps_results

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            error.keeps_results = self.keeps_results  # type: ignore[attr-defined]
            raise
        except InputError as error:
            error.args = (with_options(str(error), self),)
            raise

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: versions of click before 8.5 do not call this, so ``format_options`` does the work."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections of arguments and of options."""
        rows = [(item.make_metavar(ctx), item.help or "") for item in self.params if isinstance(item, Argument)]
        if rows:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        super().format_options(ctx, formatter)


class Group(click.Group):
    """A command that has commands of its own; for an unknown one, it suggests one that is spelled like it."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of ``args``."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(unknown_command(args[0], list(self.commands), is_prompt=False))
        return super().resolve_command(ctx, args)


class Argument(click.Argument):
    """A positional argument with a help text."""

    def __init__(self, declarations: list[str], *, help: str, metavar: str, **settings: Any) -> None:
        """Keep ``help``, which versions of click before 8.5 do not take, and show repetition in ``metavar``."""
        optional = not settings.get("required", settings.get("nargs") != -1 and "default" not in settings)
        shown = f"[{metavar}]" if optional else metavar
        super().__init__(declarations, metavar=f"{shown}..." if settings.get("nargs") == -1 else shown, **settings)
        self.help: str | None = help


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model of a command, where it runs, and in which precision."""

    model: str = DEFAULT_MODEL
    revision: str | None = None
    adapter: tuple[str, ...] = ()  # each NAME or NAME:SCALE
    max_batch_size: int | None = None  # None: as many as fit into memory
    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """The model of a generating command, and how it samples."""

    model: ModelOptions
    settings: Mapping[str, Any]  # of ``Sampling``; those that are not given are set by the model
    seed: int | None = None  # None: random
    speculative: int | None = None  # maximum number of codes to draft; 1: off, None: chosen by the model
    preview: bool = False


def argument(*declarations: str, help: str, **settings: Any) -> Decorator:
    """Return a decorator that adds an ``Argument``; ``settings`` are those of ``click.argument``."""
    return click.argument(*declarations, cls=Argument, help=help, **settings)


def combine(*decorators: Decorator) -> Decorator:
    """Return a decorator that applies ``decorators`` in the order in which their options appear in the help."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def option_group(build: Callable[..., Any], name: str, names: tuple[str, ...], *options: Decorator) -> Decorator:
    """Return a decorator that adds ``options`` and passes them to the command as one argument.

    Args:
        build: Called with the values of the options by name; a dataclass, usually.
        name: The argument of the command that receives the result.
        names: The names of the options' values.
        options: The options, as ``click.option`` returns them.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(**values: Any) -> Any:
            values[name] = build(**{key: values.pop(key) for key in names})
            return function(**values)

        decorated: Callable[..., Any] = combine(*options)(call)
        return decorated

    return decorate


def model_options(items: str) -> Decorator:
    """Add the options of ``ModelOptions``, passed as ``model``.

    Args:
        items: Plural noun of what a batch holds, such as ``images``.
    """
    names = tuple(field.name for field in fields(ModelOptions))
    options = [
        model_option(),
        revision_option(),
        adapter_option(),
        max_batch_size_option(items),
        device_option(),
        *precision_options(),
    ]
    return option_group(ModelOptions, "model", names, *options)


def precision_options() -> list[Decorator]:
    """Return ``--dtype`` and ``--kv-dtype``."""
    return [
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            help="format of the weights; int8 and int4 quantize them, which saves memory and bandwidth",
        ),
        click.option(
            "--kv-dtype",
            type=click.Choice(KV_DTYPES),
            default="auto",
            help="format of the KV cache: auto is the dtype of the computation, int8 halves the memory",
        ),
    ]


def model_option(**settings: Any) -> Decorator:
    """Return ``--model``."""
    settings = {"default": DEFAULT_MODEL, "metavar": "NAME_OR_FOLDER", "help": MODEL_HELP, **settings}
    return click.option("--model", **_without_default_if_required(settings))


def revision_option() -> Decorator:
    """Return ``--revision``."""
    return click.option(
        "--revision",
        metavar="REV",
        show_default="main",
        help="branch, tag or commit of a model on the Hugging Face Hub",
    )


def adapter_option() -> Decorator:
    """Return ``--adapter``, passed as a tuple of texts that ``AdapterChoice.parse`` reads."""
    return click.option(
        "--adapter",
        multiple=True,
        metavar="NAME[:SCALE]",
        help="LoRA adapter to add to the weights: a folder, or owner/name on the Hugging Face Hub; may be repeated. "
        "SCALE is the factor of its changes: 1 if left out, 0 for off",
    )


def device_option(**settings: Any) -> Decorator:
    """Return ``--device``."""
    settings = {"default": "auto", "help": "auto, cpu, cuda, cuda:N or mps", **settings}
    return click.option("--device", metavar="DEVICE", **settings)


def max_batch_size_option(items: str) -> Decorator:
    """Return ``--max-inference-batch-size``, passed as ``max_batch_size``: None for auto."""
    return click.option(
        "--max-inference-batch-size",
        "max_batch_size",
        type=WordOrCount({"auto": None}),
        default="auto",
        metavar="COUNT",
        help=f"maximum number of {items} in a batch; auto fits the batch to the free memory",
    )


def speculative_option() -> Decorator:
    """Return ``--speculative``, formerly ``--parallel``: None for auto, 1 for off."""
    return click.option(
        "--speculative",
        "--parallel",
        "speculative",
        type=WordOrCount({"auto": None, "off": 1}),
        default="auto",
        metavar="COUNT",
        help="maximum number of codes to draft per forward pass in speculative decoding, or off; the images are the "
        "same",
    )


def sampling_options(unit: str, *, image_options: bool, note: str = "") -> Decorator:
    """Add the options of ``Sampling``, passed as ``settings``: a mapping of those that were given.

    Args:
        unit: Plural noun of the sampled tokens, such as ``codes``.
        image_options: Whether to add guidance and text attention, which apply to images only.
        note: Condition on which the options apply, appended to their help texts.
    """
    options = {
        "temperature": click.option(
            "--temperature",
            type=click.FloatRange(min=0, min_open=True),
            metavar="T",
            show_default=MODEL_DEFAULT,
            help=f"sampling temperature{note}; lower is more deterministic, and --top-k 1 is greedy",
        ),
        "top_k": click.option(
            "--top-k",
            type=click.IntRange(min=0),
            metavar="K",
            show_default=MODEL_DEFAULT,
            help=f"sample from the K most probable {unit}{note}; 0 disables",
        ),
        "top_p": click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            metavar="P",
            show_default=MODEL_DEFAULT,
            help=f"sample from the fewest {unit} whose probabilities sum to P{note}; 1 disables",
        ),
    }
    options["min_p"] = click.option(
        "--min-p",
        type=click.FloatRange(min=0, max=1, max_open=True),
        metavar="P",
        show_default=MODEL_DEFAULT,
        help=f"sample from the {unit} with at least P times the probability of the most probable one{note}; 0 disables",
    )
    if image_options:
        options["guidance"] = click.option(
            "--guidance",
            type=click.FloatRange(min=0),
            metavar="S",
            show_default=MODEL_DEFAULT,
            help="scale of classifier-free guidance; 1 disables, other values double the time and need weights trained "
            "with caption dropout",
        )
        options["text_attention"] = click.option(
            "--text-attention",
            type=click.FloatRange(min=0, min_open=True),
            metavar="W",
            show_default=MODEL_DEFAULT,
            help="weight of the attention to the prompt; 1 is that of training",
        )
        options["noise_version"] = click.option(
            "--noise-version",
            type=click.IntRange(min=1, max=2),
            metavar="VERSION",
            show_default=MODEL_DEFAULT,
            help="noise of a seed: 2 depends on prompt and number of the image; 1 on its number alone, as before 0.3",
        )

    def build(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    return option_group(build, "settings", tuple(options), *options.values())


def session_options(items: str, same: str) -> Decorator:
    """Add the options of ``SessionOptions``, passed as ``session``.

    Args:
        items: Plural noun of what a batch holds, such as ``images``.
        same: What gives the same image with the same seed, such as "prompt and number".
    """
    return option_group(
        SessionOptions,
        "session",
        ("model", "settings", "seed", "speculative"),
        seed_option(same),
        sampling_options("codes", image_options=True),
        speculative_option(),
        model_options(items),
        json_option(),
    )


def json_option() -> Decorator:
    """Return ``--json``, which ``cogview.cli.messages`` acts on."""
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        help="print results as lines of JSON on stdout, and notes and errors as lines of JSON on stderr",
    )


def seed_option(same: str) -> Decorator:
    """Return ``--seed``; ``same`` names what else must be equal for an equal result."""
    return click.option(
        "--seed",
        type=int,
        metavar="NUMBER",
        show_default="random, printed",
        help=f"random seed; the result is the same for the same seed, {same}",
    )


def output_option(**settings: Any) -> Decorator:
    """Return ``-o``/``--output``; by default the folder of generated images."""
    settings = {"default": "outputs", "metavar": "FOLDER", "help": "folder for the results", **settings}
    return click.option("-o", "--output", type=FILE, **_without_default_if_required(settings))


def _without_default_if_required(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of an option without the default, which ``click`` would take for a value, if it is required."""
    return {key: value for key, value in settings.items() if key != "default" or not settings.get("required")}


def count_option(items: str, default: int = 1) -> Decorator:
    """Return ``-n``: the number of ``items``, such as "images per prompt"."""
    kind = click.IntRange(min=1, max=MAX_RESULTS)
    return click.option("-n", type=kind, default=default, metavar="COUNT", help=f"number of {items}")


def overrides_argument(section: str) -> Decorator:
    """Return the argument ``overrides``: KEY=VALUE pairs that change a section of a recipe."""

    def check(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if "=" not in value:
                raise click.UsageError(f'"{value}" is not KEY=VALUE of the section {section}', ctx)
        return values

    return argument(
        "overrides",
        nargs=-1,
        metavar="KEY=VALUE",
        callback=check,
        help=f"change of a setting in the section {section} of the recipe; inner keys with dots, as in a.b=1",
    )
