"""recipes/schema.json: the recipe types as a JSON Schema, for completion and hints in an editor.

    python -m minilm.orchestrator.recipe.json_schema          # writes it; a test compares it with the types

An aid for typing only: `load_recipe` checks more, and says it better. The few spellings that the types
fold away while they read (`student:`, defaults taken from elsewhere) are put back here.
"""

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from minilm.orchestrator.recipe.schema import CORPUS_PLACES, Recipe

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "recipes" / "schema.json"


class _Untitled(GenerateJsonSchema):
    """Without titles of keys: an editor would show "Peak Lr" above what peak_lr means."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file."""
    own = Recipe.model_json_schema(schema_generator=_Untitled)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **own}
    kinds = schema["$defs"]
    schema["required"].remove("tracking")
    kinds["Tracking"].pop("required")
    kinds["Student"]["required"].remove("name")
    data = kinds["Data"]
    data["properties"] |= {key: kinds["Corpus"]["properties"][key] for key in CORPUS_PLACES}
    schema["properties"]["data"] = {
        "anyOf": [
            schema["properties"]["data"],
            {"type": "array", "items": {"$ref": "#/$defs/Corpus"}, "minItems": 1},
        ]
    }
    kinds["Corpus"]["properties"]["name"].pop("default")
    stage = kinds["Stage"]
    stage["properties"]["student"] = {
        "$ref": "#/$defs/Student",
        "description": "The stage's only student; short for a list of one.",
    }
    stage["properties"]["micro_batch"].pop("default")
    stage["required"].remove("students")
    stage["oneOf"] = [{"required": ["student"]}, {"required": ["students"]}]
    stage["properties"]["assistant"] = {
        "anyOf": [{"enum": ["auto", "none"]}, {"type": "integer", "minimum": 1, "maximum": 1_000}],
        "default": "none",
        "description": "A stage before this one whose student, of the student's hidden size, becomes its teacher. "
        "auto: where the papers' rule asks for one (at most half of the teacher's layers and hidden size), with the "
        "teacher's layers; a number: with so many layers.",
    }
    schema["properties"] |= {
        "extends": {
            "type": "string",
            "description": "A recipe file that this one changes: its path, from this file's folder, or "
            "`package:IMPORT_NAME/FILE`.",
        },
        "vars": {
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            "description": "Values of variables, which other values ask for as `${NAME}` or `${NAME:-DEFAULT}`; before "
            "those of the environment.",
        },
    }
    return schema


def editor_schema() -> dict[str, Any]:
    """The same for an editor: what extends another file need not be whole, and a variable may stand for any value."""
    schema = recipe_schema()
    kinds = schema["$defs"]
    whole_stage = {key: kinds["Stage"].pop(key) for key in ("required", "oneOf")}
    student = {"required": kinds["Student"].pop("required")}
    whole_stage["properties"] = {"student": student, "students": {"items": student}}
    schema["if"] = {"required": ["extends"]}
    evaluation = {"required": kinds["Evaluation"].pop("required")}
    schema["else"] = {
        "required": schema.pop("required"),
        "properties": {"stages": {"items": whole_stage}, "evaluation": evaluation},
    }
    schema["patternProperties"] = {"^x-": {}}
    for kind in (schema, *kinds.values()):
        kind["properties"] = {key: _or_variable(value) for key, value in kind["properties"].items()}
    kinds["Variable"] = {"type": "string", "pattern": r"\$\{[A-Za-z_]\w*(:-[^{}]*)?\}"}
    return schema


def _or_variable(value: dict[str, Any]) -> dict[str, Any]:
    """A schema of a number, a truth or a word, or a variable in its place."""
    told = {key: value[key] for key in ("description", "title", "default") if key in value}
    rest = {key: inner for key, inner in value.items() if key not in told}
    choices = rest.get("anyOf", [rest])
    if not any(
        c.get("type") in ("integer", "number", "boolean") or "enum" in c or "const" in c for c in choices
    ):
        return value
    return told | {"anyOf": [*choices, {"$ref": "#/$defs/Variable"}]}


def schema_text() -> str:
    return json.dumps(editor_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
