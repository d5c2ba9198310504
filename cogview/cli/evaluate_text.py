"""``cogview eval text``: BLEU, ROUGE-L and CIDEr-D of texts against references."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.messages import print_note
from cogview.cli.options import FILE, Command, argument
from cogview.cli.result_file import check_result_path, result_option, save_result
from cogview.errors import InputError
from cogview.formatting import aligned_columns, plural, shorten

if TYPE_CHECKING:
    from cogview.evaluation.text_metrics import TextScores

NAMES = {
    "cider": "CIDEr-D",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
}


@click.command(name="text", cls=Command, keeps_results=False)
@argument("hypotheses", type=FILE, metavar="HYP", help="texts: one per line, or .jsonl, .tsv, .csv or .json with ids")
@argument(
    "references",
    type=FILE,
    metavar="REF",
    help="references: per line one or more, separated by tabs, or .jsonl, .tsv, .csv or .json with ids",
)
@click.option(
    "--by",
    "unit",
    type=click.Choice(["characters", "words"]),
    show_default="both; characters alone without jieba",
    help="tokens of Chinese: characters, or words by jieba",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@result_option()
def text(hypotheses: Path, references: Path, unit: str | None, as_json: bool, output: Path | None) -> int:
    """Measure texts against references.

    Prints CIDEr-D, BLEU-1 to 4 and ROUGE-L as MS COCO's scorer defines them, with 95% bootstrap intervals. CIDEr-D
    depends on the whole set: compare it on the same items alone.
    """
    from cogview.evaluation.text_files import match_ids, read_hypotheses, read_references

    if output is not None:
        check_result_path(output)
    candidates = read_hypotheses(hypotheses, print_note)
    true = read_references(references, print_note)
    match_ids(candidates, true, str(hypotheses), str(references))
    found = {each: _scores(candidates, true, each) for each in _units(unit)}
    if output is not None:
        _write(output, candidates, true, found)
    if as_json:
        summaries = {each: scores.summary for each, scores in found.items()}
        print(json.dumps({"items": len(candidates), **summaries}, ensure_ascii=False))
        return 0
    print(f"{plural(len(candidates), 'text')}, {plural(sum(map(len, true.values())), 'reference')}")
    rows = [["", *found]]
    for name, shown in NAMES.items():
        rows.append([shown, *(_cell(scores, name) for scores in found.values())])
    print("\n".join(aligned_columns(rows, left={0})))
    return 0


def _units(unit: str | None) -> list[str]:
    if unit is not None:
        return [unit]
    if not is_installed("jieba"):
        print_note("words are left out: they need jieba; install it: pip install jieba")
        return ["characters"]
    return ["characters", "words"]


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def _scores(candidates: dict[str, str], true: dict[str, list[str]], unit: str) -> TextScores:
    """Return the scores by characters or words; InputError for a text without any."""
    from cogview.evaluation.text_metrics import score_texts, tokenizer

    split = tokenizer(unit)
    tokens = [split(text) for text in candidates.values()]
    references = [[split(text) for text in true[key]] for key in candidates]
    for key, text, group in zip(candidates, tokens, references, strict=True):
        if not text or not all(group):
            raise InputError(f'a text or reference of the id "{shorten(key, 60)}" holds nothing but punctuation')
    return score_texts(tokens, references)


def _write(output: Path, candidates: dict[str, str], true: dict[str, list[str]], found: dict[str, TextScores]) -> None:
    """Write the scores with a manifest."""
    from cogview.evaluation.manifest import Manifest
    from cogview.evaluation.model_record import describe_hardware, describe_versions
    from cogview.evaluation.text_files import hash_texts

    versions = describe_versions("jieba")
    settings = {"by": list(found), "form": "NFKC, lower case, without punctuation"}
    if "words" in found:
        settings["jieba"] = versions["jieba"]  # its dictionary moves the values
    manifest = Manifest(
        measure="text",
        reference=hash_texts("references", true),
        candidate=hash_texts("texts", {key: [text] for key, text in candidates.items()}),
        settings=settings,
        versions=versions,
        hardware=describe_hardware(),
    )
    results = {
        f"{unit}/{name}": {**values, "n": len(candidates), "higher_is_better": True}
        for unit, scores in found.items()
        for name, values in scores.summary.items()
    }
    columns = {f"{unit}/{name}": values for unit, scores in found.items() for name, values in scores.items.items()}
    save_result(output, manifest, results, {"ids": list(candidates), "values": columns})


def _cell(scores: TextScores, name: str) -> str:
    value = scores.summary[name]
    return f"{value['value']:.4f} ({value['low']:.4f}–{value['high']:.4f})"
