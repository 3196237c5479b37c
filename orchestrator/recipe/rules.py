"""The rules of a recipe that span keys, and how a broken rule or type is put into words.

Each problem is (key path, text) with text = what was given, what is allowed, and what to do. Leaves out
what only the teacher's own files can tell (its heads, its vocabulary): the run checks those when it has
them.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from pydantic_core import ErrorDetails

from minilm.orchestrator.recipe.schema import CORPUS_PLACES, SECTIONS, Compute, Stage, Student
from minilm.orchestrator.recipe.yaml_source import KeyPath

Problem = tuple[KeyPath, str]


class _Known(NamedTuple):
    """What the recipe itself tells of a teacher."""

    layers: int | None
    hidden: int | None
    heads: int | None


_UNKNOWN = _Known(None, None, None)


def check_across(stages: Mapping[int, Stage], compute: Compute | None) -> Iterator[Problem]:
    """Problems between keys. Parts that are malformed themselves are left out (None, or no such index)."""
    earlier: dict[str, _Known] = {}
    names = [student.name for stage in stages.values() for student in stage.students]
    stage_names: set[str] = set()
    for index, stage in stages.items():
        at: KeyPath = ("stages", index)
        if stage.name in stage_names:
            yield (*at, "name"), f"given {stage.name!r} a second time; allowed: a name for each stage"
        yield from _teacher(at, stage, earlier, names, stage_names)
        yield from _numbers(at, stage, compute)
        teacher = earlier.get(stage.teacher, _UNKNOWN)
        here: dict[str, _Known] = {}
        for i, student in enumerate(stage.students):
            path: KeyPath = (*at, "students", i)
            if student.name in earlier or student.name in here:
                what = f"given {student.name!r} a second time; allowed: a name for each student of the recipe"
                yield (*path, "name"), what
            yield from _heads(path, student, stage, teacher)
            here[student.name] = _Known(student.layers, student.hidden, _own_heads(student, teacher))
        stage_names.add(stage.name)
        earlier = here | earlier


def _teacher(
    at: KeyPath,
    stage: Stage,
    earlier: Mapping[str, _Known],
    names: Collection[str],
    stage_names: Collection[str],
) -> Iterator[Problem]:
    teacher, path = stage.teacher, (*at, "teacher")
    if teacher in earlier:
        layers = earlier[teacher].layers
        if layers and stage.teacher_layer != "last" and stage.teacher_layer > layers:
            what = f"given {stage.teacher_layer}; allowed: 1 to {layers}, the layers of {teacher!r}, or last"
            yield (*at, "teacher_layer"), what
    elif teacher in [student.name for student in stage.students]:
        yield path, f"given {teacher!r}, this stage's own student; allowed: a student of an earlier stage"
    elif teacher in names:
        yield (
            path,
            f"given {teacher!r}, a student defined only later; move the stage that makes it up, above this",
        )
    elif teacher in stage_names:
        what = f"given {teacher!r}, a stage whose students have other names"
        yield path, f"{what}; allowed: a student's name: {', '.join(earlier)}"
    elif "/" not in teacher and (guess := suggest(teacher, earlier, cutoff=0.75)):
        yield path, f"given {teacher!r}, no earlier student's name{guess} (a hub id would be OWNER/NAME)"


def _numbers(at: KeyPath, stage: Stage, compute: Compute | None) -> Iterator[Problem]:
    if stage.warmup_steps >= stage.steps:
        what = f"given {stage.warmup_steps}; allowed: fewer than the stage's {stage.steps} steps"
        yield (*at, "warmup_steps"), what
    micro_batch = stage.micro_batch or (compute.micro_batch if compute else None)
    if micro_batch is None:
        return
    if stage.batch % micro_batch:
        fits = max(size for size in range(1, min(micro_batch, stage.batch) + 1) if stage.batch % size == 0)
        what = f"given {micro_batch}; allowed: a divisor of the batch {stage.batch} of stage {stage.name!r}"
        yield (*at, "micro_batch"), f"{what}; {fits} would do"
    elif compute and compute.workers[1] > stage.batch // micro_batch:
        most = stage.batch // micro_batch
        what = f"given {compute.workers[1]}; allowed: at most {most}, the micro-batches of a step ({stage.batch} / "
        yield ("compute", "workers"), f"{what}{micro_batch}) of stage {stage.name!r}"


def _own_heads(student: Student, teacher: _Known) -> int | None:
    """A student's heads: its teacher's unless given, or those of the model it starts from, which is not known here."""
    return student.heads or (None if student.starts_from else teacher.heads)


def _heads(path: KeyPath, student: Student, stage: Stage, teacher: _Known) -> Iterator[Problem]:
    heads = _own_heads(student, teacher)
    if heads and student.hidden % heads:
        key = "heads" if student.heads else "hidden"
        given = student.heads or student.hidden
        what = f"given {given}; allowed: heads that divide hidden ({student.hidden} / {heads} is not whole)"
        if student.heads and student.heads != teacher.heads:
            divisors = [n for n in range(1, student.hidden + 1) if student.hidden % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - heads))
            fits = f"heads: {teacher.heads if teacher.heads in divisors else nearest}"
        else:
            unit = math.lcm(heads, stage.relation_heads or 1)
            fits = f"hidden: {max(unit, unit * round(student.hidden / unit))}"
        yield (*path, key), f"{what}; {fits} would do"
    if stage.relation_heads is not None:
        for whose, hidden in (("the teacher's", teacher.hidden), (f"{student.name}'s", student.hidden)):
            if hidden is not None and hidden % stage.relation_heads:
                what = f"given {stage.relation_heads}; allowed: a divisor of {whose} hidden size {hidden}"
                yield (*path[:2], "relation_heads"), what
    elif student.heads and teacher.heads and student.heads != teacher.heads:
        what = f"given {student.heads}; allowed: {teacher.heads}, the heads of the teacher {stage.teacher!r}"
        yield (*path, "heads"), f"{what}, as they are compared one by one; or set relation_heads in the stage"


def follows_from_another(error: ErrorDetails) -> bool:
    """Whether pydantic says this only because something inside was wrong, which it says as well."""
    if error["type"] == "too_short":  # it counts the sound items only
        return len(error["input"]) >= error["ctx"]["min_length"]
    return error["type"] == "default_factory_not_called"


def explain(error: ErrorDetails) -> str:
    """The text for one of pydantic's errors: what was given, what is allowed, did you mean."""
    kind, given, path = error["type"], error["input"], error["loc"]
    if kind == "missing":
        return f"missing; add it{_meaning(path)}"
    if kind == "extra_forbidden":
        return _unknown_key(path)
    allowed = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if kind in ("model_type", "model_attributes_type"):
        allowed = "a mapping of KEY: VALUE lines"
    elif kind == "tuple_type":
        allowed = "a list"
    elif kind == "too_short":
        allowed = f"at least {error['ctx']['min_length']} item"
    elif kind == "too_long":
        allowed = f"at most {error['ctx']['max_length']} items"
    elif kind == "string_type":
        allowed = "text (put quotes around it)"
    elif kind.startswith("int"):
        allowed = "a whole number"
    elif kind.startswith("float"):
        allowed = "a number"
    guess = suggest(given, re.findall(r"'([^']*)'", allowed), cutoff=0.75) if kind == "literal_error" else ""
    return f"given {_show(given)}; allowed: {allowed}{guess}"


def _meaning(path: tuple[int | str, ...]) -> str:
    """The key's description in brackets, if the types have one."""
    above = [key for key in path[:-1] if isinstance(key, str)]
    section = SECTIONS.get(above[-1] if above else "")
    known = section.model_fields.get(str(path[-1])) if section else None
    return f" ({' '.join(known.description.split()).rstrip('.')})" if known and known.description else ""


RENAMED = {("compute", "reduction"): "gradient_sum"}  # (section, key of before): key


def _unknown_key(path: tuple[int | str, ...]) -> str:
    above = [key for key in path[:-1] if isinstance(key, str)]
    here = above[-1] if above else ""
    key, allowed = str(path[-1]), list(SECTIONS[here].model_fields)
    if new := RENAMED.get((here, key)):
        return f"this key is called {new} now, with the same values; rename it"
    if here == "stages":
        allowed.insert(allowed.index("students"), "student")
    if here == "data":
        allowed[1:1] = CORPUS_PLACES
    elsewhere = [section or "the top" for section, kind in SECTIONS.items() if key in kind.model_fields]
    guess = f"; it belongs under {' or '.join(elsewhere)}" if elsewhere else suggest(key, allowed)
    return f"unknown key{guess}; allowed: {', '.join(allowed)}"


def suggest(given: object, allowed: Collection[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?`, or nothing."""
    if not isinstance(given, str) or not given:
        return ""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=cutoff)
    close = close or [word for word in allowed if len(given) > 1 and given in word.split("_")]
    return f"; did you mean {close[0]!r}?" if close else ""


def _show(value: object) -> str:
    text = "nothing" if value is None else "a mapping" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
