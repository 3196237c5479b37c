"""The kinds of single values in a recipe: names, paths, references, bounded numbers.

A validator raises ValueError with the words that follow "allowed:" in the message to the author. Leaves
out which key is of which kind (schema.py).
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.references import VARIABLE, check_form
from minilm.orchestrator.stage.folder import CHECKPOINT_SCHEMES

INITIALIZATIONS = ("random", "teacher-layers", "teacher-pca")  # the model's own list, a test says
URL_SCHEMES = ("s3", "gs", "https", "http", "file")  # the data layer reads from these, a test says


def _in_words(words: str) -> WrapValidator:
    """Both bounds of a number, whatever is wrong with it: a reader who mends one does not run into the other."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, bool):  # pydantic would read true as 1
            with suppress(ValidationError):
                return handler(value)
        raise ValueError(words)

    return WrapValidator(check)


def _slug(value: Any) -> Any:
    text = value if isinstance(value, str) else ""
    words = text.replace("_", "-").split("-")
    if (
        len(text) > 63
        or text.isdecimal()
        or not all(w.isascii() and w.isalnum() and w == w.lower() for w in words)
    ):
        raise ValueError("a name of a-z, 0-9, - and _, not a number alone, 63 characters at most")
    return value


def _alias(value: Any) -> Any:
    text = _slug(value)
    if text == "latest" or (text[0] == "v" and text[1:].isdecimal()):
        raise ValueError(
            "a name of a-z, 0-9, - and _ that MLflow does not keep for itself (latest, v1, v2, …)"
        )
    return text


def _reference(value: Any) -> Any:
    if not isinstance(value, str) or VARIABLE.search(value):
        raise ValueError("a reference written as text")
    try:
        check_form(value)
    except UserError as error:
        raise ValueError(str(error).partition("allowed: ")[2]) from None
    return value


STARTS = (
    f"{', '.join(INITIALIZATIONS)}, or a model to go on from: an earlier student's name, models:/NAME@ALIAS, "
    "models:/NAME/VERSION, a folder (/…, ./…, ../…, ~/…), package:IMPORT_NAME/PATH or a hub id OWNER/NAME"
)


def _start(value: Any) -> Any:
    try:
        if not isinstance(value, str) or "/" not in value:
            return _slug(value)  # a method or a student's name: `rules` knows them
        check_form(value)
    except (UserError, ValueError):
        raise ValueError(STARTS) from None
    return value


def _local_path(value: Any) -> Any:
    if not isinstance(value, str) or not value or "://" in value or VARIABLE.search(value):
        raise ValueError("a path on this machine")
    if value.startswith("~"):  # `load` puts the folder there
        raise ValueError(
            "a path on this machine, where no user is called so; begin with ./ where ~ is part of a name"
        )
    return value


def _place(value: Any) -> Any:
    if not isinstance(value, str) or "://" not in value:
        return _local_path(value)
    scheme, _, rest = value.partition("://")
    if scheme not in URL_SCHEMES or not rest or "::" in rest or "?" in rest or VARIABLE.search(rest):
        raise ValueError(
            f"a folder, or a URL of {', '.join(f'{s}://' for s in URL_SCHEMES)} without parameters"
        )
    if "@" in rest.partition("/")[0]:
        raise ValueError("a URL without credentials; they come from the environment (AWS_ACCESS_KEY_ID, …)")
    return value.rstrip("/")


def _checkpoint_place(value: Any) -> Any:
    text = value if isinstance(value, str) else ""
    scheme, is_url, path = text.partition("://")
    sound = path and not set(path) & set("?#@*[] ") and path.startswith("/") == (scheme == "file")
    if (
        not text
        or text.startswith("~")
        or VARIABLE.search(text)
        or (is_url and not (sound and scheme in ("file", *CHECKPOINT_SCHEMES)))
    ):
        raise ValueError("a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    return text.rstrip("/")


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _last_or_number(value: Any) -> Any:
    if value == "last" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("last, or a layer's number counted from 1")


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


def _workers(value: Any) -> Any:
    if value == "auto":
        return value
    least, most = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    numbers = [n for n in (least, most) if isinstance(n, int) and not isinstance(n, bool) and n >= 1]
    if len(numbers) < 2 or least > most:
        raise ValueError("auto, a number of at least 1, or [LEAST, MOST] for a run that grows and shrinks")
    return least, most


# A validator stands last, so that the bounds before it reach the JSON Schema.
MOST = 10**9  # of what is counted: far beyond any use, and its products still are 64-bit integers
YEAR = 31_536_000
Count = Annotated[int, Field(ge=1, le=MOST), _in_words("a whole number from 1 to 1e9")]
CountFromZero = Annotated[int, Field(ge=0, le=MOST), _in_words("a whole number from 0 to 1e9")]
Layers = Annotated[int, Field(ge=1, le=1_000), _in_words("a whole number from 1 to 1000")]
Width = Annotated[int, Field(ge=1, le=1 << 20), _in_words("a whole number from 1 to 1048576")]
SequenceLength = Annotated[int, Field(ge=8, le=65_536), _in_words("a whole number from 8 to 65536")]
Seed = Annotated[int, Field(ge=0, lt=2**63), _in_words("a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Field(gt=0, le=1e9), _in_words("a number above 0, at most 1e9")]
NonNegative = Annotated[float, Field(ge=0, le=1e9), _in_words("a number from 0 to 1e9")]
Seconds = Annotated[float, Field(gt=0, le=YEAR), _in_words("seconds, above 0 and at most 31536000 (a year)")]
SecondsFromZero = Annotated[float, Field(ge=0, le=YEAR), _in_words("seconds, from 0 to 31536000 (a year)")]
Fraction = Annotated[float, Field(ge=0, lt=1), _in_words("a number of at least 0 and below 1")]
Betas = Annotated[
    tuple[Fraction, Fraction], _in_words("two numbers of at least 0 and below 1, as [0.9, 0.999]")
]
Share = Annotated[float, Field(ge=0, le=1), _in_words("a number from 0 to 1")]
ShareAboveZero = Annotated[float, Field(gt=0, le=1), _in_words("a number above 0, at most 1")]
HeldOutShare = Annotated[float, Field(gt=0, le=0.5), _in_words("a number above 0, at most 0.5")]
LearningRate = Annotated[
    float,
    Field(gt=0, le=1),
    _in_words(
        "a number above 0, at most 1; Adam moves a weight by about so much a step, and most recipes have 1e-4 to 1e-3"
    ),
]
Threads = Annotated[int, Field(ge=1, le=4_096), _in_words("auto, or a whole number from 1 to 4096")]
ThreadsOrAuto = Annotated[
    Threads | None,
    BeforeValidator(_auto_is_none),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": 4_096}]}),
]
Workers = Annotated[
    tuple[int, int] | Literal["auto"],
    BeforeValidator(_workers),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "auto"},
                {"type": "integer", "minimum": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
            ],
            "default": 1,
        }
    ),
]
LayerNumber = Annotated[Literal["last"] | Count, BeforeValidator(_last_or_number)]
_NAME, _LINE, _LANGUAGE = (
    r"^[a-z0-9]+([-_][a-z0-9]+)*$",
    r"^[^\s\x00-\x1f](.*[^\s])?$",
    r"^[a-z]{2,3}(-[a-z]+)*$",
)
PATTERNS = {  # in words
    _NAME: "name of a-z, 0-9, - and _",
    _LINE: "a line of text",
    _LANGUAGE: "a language's code, as en, de or pt-br",
}
Slug = Annotated[str, Field(pattern=_NAME, max_length=63), BeforeValidator(_slug)]
Alias = Annotated[Slug, BeforeValidator(_alias)]
CardText = Annotated[str, Field(pattern=_LINE, max_length=300), _in_words(PATTERNS[_LINE])]
LanguageCode = Annotated[str, Field(pattern=_LANGUAGE), _in_words(PATTERNS[_LANGUAGE])]
ReferenceText = Annotated[str, BeforeValidator(_reference)]
Start = Annotated[
    str,
    BeforeValidator(_start),
    WithJsonSchema({"anyOf": [{"enum": list(INITIALIZATIONS)}, {"type": "string"}]}),
]
CheckpointPlace = Annotated[str, BeforeValidator(_checkpoint_place)]
LocalFolder = Annotated[Path, BeforeValidator(_local_path)]
LocalPath = Annotated[str, BeforeValidator(_local_path)]
Place = Annotated[str, BeforeValidator(_place)]
TextPaths = Annotated[
    tuple[LocalPath, ...],
    BeforeValidator(_one_or_several),
    Field(min_length=1),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]
