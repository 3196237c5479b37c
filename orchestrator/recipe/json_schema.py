"""recipes/schema.json: the recipe types as a JSON Schema, for completion and hints in an editor.

    python -m minilm.orchestrator.recipe.json_schema          # writes it; a test compares it with the types

An aid for typing only: `load_recipe` checks more, and says it better. The few spellings that the types
fold away while they read (`student:`, defaults taken from elsewhere) are put back here.
"""

import json
from pathlib import Path
from typing import Any

from minilm.orchestrator.recipe.schema import CORPUS_PLACES, Recipe

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "recipes" / "schema.json"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
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
    return schema


def schema_text() -> str:
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
