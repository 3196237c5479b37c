"""The rules of a recipe that span keys, and how a broken rule or type is put into words.

Each problem is (key path, text) with text = what was given, what is allowed, and what to do. Leaves out
what only the teacher's own files can tell (its heads, its vocabulary): the run checks those when it has
them.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping

from pydantic_core import ErrorDetails

from orchestrator.recipe_source import KeyPath
from orchestrator.recipe_types import SECTIONS, Compute, Data, Stage, Student

Problem = tuple[KeyPath, str]


def check_across(
    data: Data | None, stages: Mapping[int, Stage], compute: Compute | None
) -> Iterator[Problem]:
    """Problems between keys. Parts that are malformed themselves are left out (None, or no such index)."""
    earlier: dict[str, tuple[Student, int | None]] = {}  # student → with its number of heads where known
    names = [student.name for stage in stages.values() for student in stage.students]
    stage_names: set[str] = set()
    for index, stage in stages.items():
        at: KeyPath = ("stages", index)
        if stage.name in stage_names:
            yield (*at, "name"), f"given {stage.name!r} a second time; allowed: a name for each stage"
        stage_names.add(stage.name)
        yield from _teacher(at, stage, earlier, names, stage_names - {stage.name})
        yield from _numbers(at, stage, data, compute)
        taught_by = earlier.get(stage.teacher)
        for i, student in enumerate(stage.students):
            here: KeyPath = (*at, "students", i)
            if student.name in earlier or student.name in [other.name for other in stage.students[:i]]:
                what = f"given {student.name!r} a second time; allowed: a name for each student of the recipe"
                yield (*here, "name"), what
            yield from _heads(here, student, stage.teacher, taught_by[1] if taught_by else None)
        inherited = taught_by[1] if taught_by else None
        earlier |= {s.name: (s, s.heads or inherited) for s in stage.students if s.name not in earlier}


def _teacher(
    at: KeyPath,
    stage: Stage,
    earlier: Mapping[str, tuple[Student, int | None]],
    names: Collection[str],
    stage_names: Collection[str],
) -> Iterator[Problem]:
    teacher, here = stage.teacher, (*at, "teacher")
    if teacher in earlier:
        layers = earlier[teacher][0].layers
        if stage.teacher_layer != "last" and stage.teacher_layer > layers:
            what = f"given layer {stage.teacher_layer}; allowed: 1 to {layers}, the layers of {teacher!r}"
            yield (*at, "teacher_layer"), what
    elif teacher in [student.name for student in stage.students]:
        yield here, f"given {teacher!r}, this stage's own student; allowed: a student of an earlier stage"
    elif teacher in names:
        yield (
            here,
            f"given {teacher!r}, a student defined only later; move the stage that makes it up, above this",
        )
    elif teacher in stage_names:
        what = f"given {teacher!r}, a stage with several students; allowed: one of its students by name"
        yield here, what
    elif "/" not in teacher and (guess := suggest(teacher, earlier, cutoff=0.75)):
        yield here, f"given {teacher!r}, no earlier student's name{guess} (a hub id would be OWNER/NAME)"


def _numbers(at: KeyPath, stage: Stage, data: Data | None, compute: Compute | None) -> Iterator[Problem]:
    if stage.warmup_steps >= stage.steps:
        what = f"given {stage.warmup_steps}; allowed: fewer than the stage's {stage.steps} steps"
        yield (*at, "warmup_steps"), what
    if stage.eval_every is not None and stage.held_out_rows == 0:
        yield (*at, "eval_every"), "given with held_out_rows: 0; allowed: held_out_rows of at least 1"
    if stage.eval_every is not None and data is not None and data.text and data.held_out == 0:
        yield (*at, "eval_every"), "given with data.held_out: 0; allowed: a held_out above 0, as 0.01"
    micro_batch = stage.micro_batch or (compute.micro_batch if compute else None)
    if micro_batch is None:
        return
    where: KeyPath = (*at, "micro_batch") if stage.micro_batch else ("compute", "micro_batch")
    if stage.batch % micro_batch:
        fits = max(size for size in range(1, min(micro_batch, stage.batch) + 1) if stage.batch % size == 0)
        what = f"given {micro_batch}; allowed: a divisor of the batch {stage.batch} of stage {stage.name!r}"
        yield where, f"{what}; {fits} would do"
    elif compute and compute.workers > stage.batch // micro_batch:
        most = stage.batch // micro_batch
        what = (
            f"given {compute.workers}; allowed: {most} at most, the micro-batches of a step ({stage.batch} / "
        )
        yield ("compute", "workers"), f"{what}{micro_batch}) of stage {stage.name!r}"


def _heads(here: KeyPath, student: Student, teacher: str, teacher_heads: int | None) -> Iterator[Problem]:
    heads = student.heads or teacher_heads
    if heads and student.hidden % heads:
        nearest = max(heads, heads * round(student.hidden / heads))
        key = "heads" if student.heads else "hidden"
        given = student.heads or student.hidden
        what = f"given {given}; allowed: heads that divide hidden ({student.hidden} / {heads} is not whole)"
        yield (*here, key), f"{what}; hidden: {nearest} would do"
    if student.heads and teacher_heads and student.heads != teacher_heads:
        what = f"given {student.heads}; allowed: {teacher_heads}, the heads of the teacher {teacher!r}"
        yield (*here, "heads"), f"{what} (the objective compares head by head)"


def follows_from_another(error: ErrorDetails) -> bool:
    """Whether pydantic says this only because something inside was wrong, which it says as well."""
    if error["type"] == "too_short":  # it counts the sound items only
        return len(error["input"]) >= error["ctx"]["min_length"]
    return error["type"] == "default_factory_not_called"


def explain(error: ErrorDetails) -> str:
    """The text for one of pydantic's errors: what was given, what is allowed, did you mean."""
    kind, given, path = error["type"], error["input"], error["loc"]
    if kind == "missing":
        return "missing; add it"
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
    guess = suggest(given, re.findall(r"'([^']*)'", allowed)) if kind == "literal_error" else ""
    return f"given {_show(given)}; allowed: {allowed}{guess}"


def _unknown_key(path: tuple[int | str, ...]) -> str:
    above = [key for key in path[:-1] if isinstance(key, str)]
    here = above[-1] if above else ""
    key, allowed = str(path[-1]), list(SECTIONS[here].model_fields)
    if here == "stages":
        allowed.insert(allowed.index("students"), "student")
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
