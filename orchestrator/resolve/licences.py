"""What teachers and data say of their licences on their cards: never guessed, and warned of where it matters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve.folders import text_inputs
from minilm.orchestrator.resolve.stages import ResolvedStage

CARD = "README.md"
UNKNOWN: tuple[Any, ...] = (None, "", [], "unknown", "other")  # other: what it is stands in license_name
# as the hub calls licences (cc-by-nc-4.0, fair-noncommercial-research-license, intel-research, apple-amlr, …), and as
# people write them in a name (CC BY-NC 4.0, Non Commercial)
_NOT_COMMERCIAL = re.compile(
    r"(?<![a-z])nc(?![a-z])|non[\W_]?commercial|research|^apple-amlr$|^deepfloyd-if", re.IGNORECASE
)
_NOT_DERIVED = re.compile(r"(?<![a-z])nd(?![a-z])|no[\W_]?deriv", re.IGNORECASE)


def card_of(folder: Path) -> Mapping[str, Any]:
    """The metadata of the card in a folder of a model or of data; empty without one, and for what is none."""
    path = folder / CARD
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard  # a second to import

    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # a file that is no card, or whose head is no YAML: nothing is known then
        return {}


def licence_of(card: Mapping[str, Any]) -> Any:
    """A name, or several, as the card gives it; where `license` is other, the name that stands beside it."""
    return card.get("license_name") or card.get("license")


def licence_notes(recipe: Recipe, stages: Sequence[ResolvedStage]) -> list[str]:
    """A line for each teacher, start and data set that states no licence or one with limits, of those that are here."""
    notes = []
    for what, folder in _models(recipe, stages):
        card = card_of(folder)
        licence = licence_of(card)
        if licence in UNKNOWN and recipe.stated.license is None:
            notes.append(
                f"no licence is known of {what} (its card, {CARD}, names none), and so none of the students; find out "
                f"and state theirs: card.license"
            )
        elif limit := limit_of(licence):
            notes.append(f"{what} has the licence {licence}, {limit}")
    places = _data_folders(recipe)
    found = {f"the data in {place}": licence_of(card_of(place)) for place in places}
    if recipe.stated.data_license:
        found = {"the text": recipe.stated.data_license}
    for what, licence in found.items():
        if limit := limit_of(licence):
            notes.append(f"{what} has the licence {licence}, {limit}")
    if recipe.stated.license and (limit := limit_of(recipe.stated.license)):
        notes.append(f"the students have the licence {recipe.stated.license}, by card.license, {limit}")
    return notes


def limit_of(licence: Any) -> str:
    """What a licence forbids, in words; empty where it is not known to forbid anything."""
    text = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence or "")
    limits = ["forbids commercial use"] if _NOT_COMMERCIAL.search(text) else []
    limits += ["allows no derived works, which a student may be"] if _NOT_DERIVED.search(text) else []
    return "which " + " and ".join(limits) + "; the students' cards say so" if limits else ""


def _models(recipe: Recipe, stages: Sequence[ResolvedStage]) -> Iterator[tuple[str, Path]]:
    """The teachers and starts from outside that are folders here, each once."""
    seen = set()
    for resolved in stages:
        given = [(f"teacher {resolved.stage.teacher}", resolved.source)]
        starts = {student.name: student.init for student in resolved.stage.students}
        given += [(f"start {starts[name]}", folder) for name, folder in resolved.starts.items()]
        for what, folder in given:
            if folder and folder not in seen and Path(folder).is_dir():
                seen.add(folder)
                yield what, Path(folder)


def _data_folders(recipe: Recipe) -> list[Path]:
    """Folders here in which a card of the data may lie."""
    given = [corpus.shards or corpus.tokens or "" for corpus in recipe.data.corpora or ()]
    paths = [
        Path(path) for path in (*given, *map(str, text_inputs(recipe.data.text or ()))) if "://" not in path
    ]
    folders = [path if path.is_dir() else path.parent for path in paths]
    return list(dict.fromkeys(folder for folder in folders if (folder / CARD).is_file()))
