"""docs/recipe-keys.md: every key of a recipe, made from the recipe's types by way of their JSON Schema.

python -m minilm.orchestrator.recipe.reference          # writes it; a test compares it with the types
"""

import json
from pathlib import Path
from typing import Any

from minilm.orchestrator.recipe.fields import PATTERNS
from minilm.orchestrator.recipe.json_schema import recipe_schema

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe-keys.md"
HEAD = """# Every key of a recipe

Made from the types in [orchestrator/recipe/schema.py](../orchestrator/recipe/schema.py) by
`python -m minilm.orchestrator.recipe.reference`; a test holds it equal to them. [Writing recipes](recipes.md) explains
how the keys work together, and the [glossary](glossary.md) the words. **Bold**: has no default, so it must be given.
"""
# a kind of the schema: how its keys are written with `--set`, and the word for its heading
SECTIONS = {
    "": ("KEY", "The recipe"),
    "Data": ("data.KEY", "data"),
    "Corpus": ("data.corpora.N.KEY", "data.corpora"),
    "Stage": ("stages.NAME.KEY", "stages"),
    "Student": ("stages.NAME.student.KEY, stages.NAME.students.NAME.KEY", "student"),
    "RelationTerm": ("stages.NAME.relations.NAME.KEY", "relations"),
    "Embedding": ("stages.NAME.embedding.KEY", "embedding"),
    "Measurement": ("stages.NAME.evaluate.N.KEY", "evaluate"),
    "Until": ("stages.NAME.until.KEY", "until"),
    "Compute": ("compute.KEY", "compute"),
    "Evaluation": ("evaluation.KEY", "evaluation"),
    "Promotion": ("promote.KEY", "promote"),
    "Card": ("card.KEY", "card"),
    "Tracking": ("tracking.KEY", "tracking"),
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference_text() -> str:
    schema = recipe_schema()
    assert set(schema["$defs"]) | {""} == set(SECTIONS), "a section of the recipe has no place in this page"
    parts = [HEAD]
    for kind, (path, heading) in SECTIONS.items():
        section = schema["$defs"][kind] if kind else schema
        parts.append(f"## {heading}\n{one_line(section['description'])} Written `{path}`.\n")
        rows = [row(key, value, section, schema) for key, value in section["properties"].items()]
        parts.append("\n".join(("| key | value | default | meaning |", "|---|---|---|---|", *rows)) + "\n")
    return "\n".join(parts)


def row(key: str, value: dict[str, Any], section: dict[str, Any], schema: dict[str, Any]) -> str:
    required = key in section.get("required", ())
    default = whole(value.get("default"))
    written = default if isinstance(default, str) else json.dumps(default)
    shown = "" if default is None else f"`{written}`"
    name = f"**`{key}`**" if required else f"`{key}`"
    meaning = one_line(value.get("description") or referred(value, schema)["description"])
    cells = (cell.replace("|", "\\|") for cell in (name, allowed(value), shown, meaning))
    return f"| {' | '.join(cells)} |"


def allowed(value: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in value:
        return f"[a section](#{anchor(kind_of(value))})"
    if "anyOf" in value:
        return " or ".join(allowed(one) for one in value["anyOf"] if one.get("type") != "null")
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    kind = value.get("type")
    if kind == "array":
        if "prefixItems" in value:
            return f"[{', '.join(allowed(one) for one in value['prefixItems'])}]"
        if "$ref" in value["items"]:
            return f"[a list](#{anchor(kind_of(value['items']))})"
        number = f" {value['minItems']}" if value.get("maxItems") == value.get("minItems") else ""
        return f"a list of{number}: {allowed(value['items'])}"
    if kind in ("integer", "number"):
        word = "whole number" if kind == "integer" else "number"
        # a bound beyond any use keeps slips out, and needs no word
        bounds = [
            f"{sign} {whole(value[key]):,}" for key, sign in BOUNDS.items() if value.get(key, 1e9) < 1e9
        ]
        return f"{word} {' and '.join(bounds)}".strip()
    if kind == "string":
        return PATTERNS[value["pattern"]] if "pattern" in value else "text"
    if kind == "boolean":
        return "`true`, `false`"
    assert kind == "object", value
    return "keys and values"


def whole(value: Any) -> Any:
    """64 for 64.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def kind_of(value: dict[str, Any]) -> str:
    return str(value["$ref"]).rpartition("/")[2]


def referred(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The section that a value without a description of its own is."""
    refs = [one for one in (value, *value.get("anyOf", ())) if "$ref" in one]
    return dict(schema["$defs"][kind_of(refs[0])])


def anchor(kind: str) -> str:
    return SECTIONS[kind][1].replace(".", "")


def one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(reference_text(), encoding="utf-8")
