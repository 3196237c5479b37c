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

from minilm.orchestrator.evaluation.probes.catalogue import DIVERGENCE, PROBES
from minilm.orchestrator.recipe.fields import INITIALIZATIONS, STARTS
from minilm.orchestrator.recipe.references import VARIABLE
from minilm.orchestrator.recipe.schema import (
    CORPUS_PLACES,
    OPEN_SCHEDULES,
    SECTIONS,
    Compute,
    Data,
    Stage,
    Student,
)
from minilm.orchestrator.recipe.yaml_source import KeyPath

Problem = tuple[KeyPath, str]


class _Known(NamedTuple):
    """What the recipe itself tells of a teacher."""

    layers: int | None
    hidden: int | None
    heads: int | None


_UNKNOWN = _Known(None, None, None)
_NOT_WHOLE = "is not whole"


def check_across(
    stages: Mapping[int, Stage], compute: Compute | None, data: Data | None = None, *, advise: bool = True
) -> Iterator[Problem]:
    """Problems between keys. Parts that are malformed themselves are left out (None, or no such index).

    advise: say what would do, having tried that it leads to no other problem.
    """
    earlier: dict[str, _Known] = {}
    made_by = {student.name: stage for stage in stages.values() for student in stage.students}
    stage_names: set[str] = set()
    for index, stage in stages.items():
        at: KeyPath = ("stages", index)
        if stage.name in stage_names:
            yield (*at, "name"), f"given {stage.name!r} a second time; allowed: a name for each stage"
        yield from _teacher(at, stage, earlier, made_by, stage_names)
        yield from _numbers(at, stage, compute, stages.values())
        yield from _schedule(at, stage)
        yield from _probes(at, stage)
        yield from _until(at, stage)
        yield from _embedding(at, stage, stages, made_by)
        if stage.objective == "embedding" and data and data.text and data.packing in ("full", "masked"):
            yield (
                ("data", "packing"),
                f"given {data.packing!r}; allowed: sentence or document, because stage {stage.name!r} compares the "
                "vectors of whole texts (objective: embedding)",
            )
        teacher = earlier.get(stage.teacher, _UNKNOWN)
        yield from _relation_heads(at, stage, teacher)
        here: dict[str, _Known] = {}
        for i, student in enumerate(stage.students):
            path: KeyPath = (*at, "students", i)
            if student.name in earlier or student.name in here:
                what = f"given {student.name!r} a second time; allowed: a name for each student of the recipe"
                yield (*path, "name"), what
            if student.start_share and student.init == "random":
                what = f"given {student.start_share:g} with init: random, a start that has learned nothing"
                yield (*path, "start_share"), f"{what}; allowed: 0; leave it out, or give another init"
            if student.starts_from and "/" not in student.starts_from and set(range(index)) <= stages.keys():
                yield from _start(path, student, stage, earlier, made_by)
            for problem in _heads(path, student, stage, teacher):
                advice = _fitting(stages, index, i, teacher) if advise and _NOT_WHOLE in problem[1] else ""
                yield problem[0], problem[1] + advice
            heads = _own_heads(student, teacher)
            sound = heads if heads and student.hidden % heads == 0 else None
            here[student.name] = _Known(student.layers, student.hidden, sound)
        stage_names.add(stage.name)
        earlier = here | earlier


def _teacher(
    at: KeyPath,
    stage: Stage,
    earlier: Mapping[str, _Known],
    made_by: Mapping[str, Stage],
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
    elif teacher in made_by:
        if cycle := _cycle(stage, made_by):
            what = f"given {teacher!r}, and so a cycle of teachers: {' → '.join(cycle)}"
            yield (
                path,
                f"{what}; allowed in one of these stages: a teacher from elsewhere, as OWNER/NAME or ./FOLDER",
            )
            return
        what = f"given {teacher!r}, a student defined only later"
        yield path, f"{what}; move the stage that makes it ({made_by[teacher].name}) up, above this"
    elif teacher in stage_names:
        what = f"given {teacher!r}, a stage whose students have other names"
        yield path, f"{what}; allowed: a student's name: {', '.join(earlier)}"
    elif "/" not in teacher and (guess := suggest(teacher, earlier, cutoff=0.75)):
        yield path, f"given {teacher!r}, no earlier student's name{guess} (a hub id would be OWNER/NAME)"


def _start(
    path: KeyPath,
    student: Student,
    stage: Stage,
    earlier: Mapping[str, _Known],
    made_by: Mapping[str, Stage],
) -> Iterator[Problem]:
    """Of `init` with an earlier student's name."""
    start = student.init
    if (known := earlier.get(start)) is None:
        if start in [other.name for other in stage.students]:
            what = f"given {start!r}, of this stage itself; allowed: a student of an earlier stage"
            yield (*path, "init"), what
        elif start in made_by:
            what = f"given {start!r}, a student defined only later"
            yield (
                (*path, "init"),
                f"{what}; move the stage that makes it ({made_by[start].name}) up, above this",
            )
        else:
            guess = suggest(start, [*INITIALIZATIONS, *earlier], cutoff=0.8)
            yield (*path, "init"), f"given {start!r}; allowed: {STARTS}{guess}"
        return
    for key in ("layers", "hidden"):
        own, theirs = getattr(student, key), getattr(known, key)
        if own != theirs:
            yield (
                (*path, key),
                f"given {own}; allowed: {theirs}, as of the student {start!r} that it starts from",
            )


def _embedding(
    at: KeyPath, stage: Stage, stages: Mapping[int, Stage], made_by: Mapping[str, Stage]
) -> Iterator[Problem]:
    """What goes with `objective: embedding`, and with no other."""
    if stage.objective != "embedding":
        if stage.embedding is not None:
            what = f"given with objective: {stage.objective}; allowed with objective: embedding"
            yield (*at, "embedding"), f"{what}; change that, or leave these keys out"
        return
    others = {"relations": None, "relation_heads": None, "reduction": "sequence", "teacher_layer": "last"}
    for key, usual in others.items():
        if getattr(stage, key) != usual:
            what = "given with objective: embedding, which compares whole vectors of the last layers"
            yield (*at, key), f"{what}; leave it out"
    maker = made_by.get(stage.teacher)
    if maker is not None and maker.objective != "embedding" and maker in stages.values():
        what = (
            f"given {stage.teacher!r}, whose vectors mean nothing: its stage {maker.name!r} trains relations"
        )
        yield (
            (*at, "teacher"),
            f"{what}; allowed: a model that embeds texts (to start from it: init: {stage.teacher})",
        )


def _cycle(stage: Stage, made_by: Mapping[str, Stage]) -> list[str]:
    """Teacher, student, student's student … back to the first; empty where the teachers of `stage` have a beginning."""
    chain = [stage.teacher]
    while (maker := made_by.get(chain[0])) and maker.teacher not in chain:
        chain.insert(0, maker.teacher)
    in_cycle = maker is not None and any(student.name in chain for student in stage.students)
    return [maker.teacher, *chain] if maker and in_cycle else []


def _numbers(
    at: KeyPath, stage: Stage, compute: Compute | None, stages: Collection[Stage]
) -> Iterator[Problem]:
    if stage.warmup_steps >= stage.steps:
        what = f"given {stage.warmup_steps}; allowed: fewer than the stage's {stage.steps} steps"
        yield (*at, "warmup_steps"), what
    micro_batch = stage.micro_batch or (compute.micro_batch if compute else None)
    if micro_batch is None:
        return
    if stage.batch % micro_batch:
        batches = math.gcd(*(other.batch for other in stages if other.micro_batch in (None, micro_batch)))
        fits = max(size for size in range(1, min(micro_batch, batches) + 1) if batches % size == 0)
        untouched = (
            compute and "micro_batch" not in compute.model_fields_set and micro_batch == compute.micro_batch
        )
        what = f"its default is {micro_batch}" if untouched else f"given {micro_batch}"
        allowed = f"allowed: a divisor of the batch {stage.batch} of stage {stage.name!r}"
        yield (*at, "micro_batch"), f"{what}; {allowed}; {fits} would do"
    elif compute and compute.workers != "auto" and compute.workers[1] > stage.batch // micro_batch:
        most = stage.batch // micro_batch
        what = f"given {compute.workers[1]}; allowed: at most {most}, the micro-batches of a step ({stage.batch} / "
        yield ("compute", "workers"), f"{what}{micro_batch}) of stage {stage.name!r}"


def _schedule(at: KeyPath, stage: Stage) -> Iterator[Problem]:
    decay, most = stage.decay_steps, stage.steps - stage.warmup_steps
    if stage.schedule != "wsd":
        if decay is not None:
            what = f"given {decay} with schedule: {stage.schedule}; allowed with schedule: wsd"
            yield (*at, "decay_steps"), f"{what}; remove it, or change the schedule"
    elif decay is None:
        yield (*at, "decay_steps"), f"missing; schedule: wsd needs it, the steps of its decay, at most {most}"
    elif decay > most:
        what = f"given {decay}; allowed: at most {most}, the stage's {stage.steps} steps without its warm-up"
        yield (*at, "decay_steps"), what


def _probes(at: KeyPath, stage: Stage) -> Iterator[Problem]:
    names: list[str] = []
    for i, item in enumerate(stage.evaluate):
        path, probe = (*at, "evaluate", i), PROBES[item.probe]
        if item.probe in names:
            yield (*path, "probe"), f"given {item.probe!r} a second time; allowed: each probe once"
        if probe.task and item.data is None:
            what = f"missing; probe {item.probe} reads the files of task {probe.task}"
            yield (
                (*path, "data"),
                f"{what}; give the folder that holds the task's folder, here or as evaluation.data",
            )
        elif item.data is not None and not (probe.task or probe.rows):
            what = f"given {item.data!r}; probe {item.probe} reads the stage's own held-out rows; remove it"
            yield (*path, "data"), what
        names.append(item.probe)


def _until(at: KeyPath, stage: Stage) -> Iterator[Problem]:
    if (until := stage.until) is None:
        return
    path, measured = (*at, "until"), [DIVERGENCE, *(item.probe for item in stage.evaluate)]
    if stage.schedule not in OPEN_SCHEDULES:
        what = (
            f"given with schedule: {stage.schedule}, whose rate at every step depends on where the stage ends"
        )
        yield path, f"{what}; allowed: schedule: wsd with decay_steps, or schedule: constant"
    if until.probe not in measured:
        what = f"given {until.probe!r}; allowed: a probe of the stage's evaluate, or {DIVERGENCE}"
        data = ", data: DIR" if PROBES[until.probe].task else ""
        yield (*path, "probe"), f"{what}; add evaluate: [{{probe: {until.probe}, every: STEPS{data}}}]"
    elif (every := stage.every(until.probe)) is None:
        what = f"given {until.probe!r}, which is measured before and after only"
        yield (*path, "probe"), f"{what}; give the stage eval_every: STEPS"
    elif (end := stage.steps - (stage.decay_steps or 0)) <= every * -(-max(1, stage.warmup_steps) // every):
        what = f"given {until.probe!r}, which is measured every {every} steps, not once between the warm-up"
        yield (*path, "probe"), f"{what} ({stage.warmup_steps}) and step {end}; give it a smaller every"
    if until.share_of_teacher is None and until.patience is None:
        yield path, "given no condition; allowed: share_of_teacher: SHARE, patience: MEASUREMENTS, or both"
    elif until.share_of_teacher is not None and not PROBES[until.probe].teacher:
        others = ", ".join(name for name in measured if PROBES[name].teacher)
        what = f"given {until.share_of_teacher:g} of {until.probe}, for which the teacher has no value"
        yield (
            (*path, "share_of_teacher"),
            f"{what}; allowed: patience: MEASUREMENTS, or a share of {others or 'another probe of evaluate'}",
        )


def _own_heads(student: Student, teacher: _Known) -> int | None:
    """A student's heads: its teacher's unless given, or those of the model it starts from, which is not known here."""
    return student.heads or (None if student.starts_from else teacher.heads)


def _heads(path: KeyPath, student: Student, stage: Stage, teacher: _Known) -> Iterator[Problem]:
    heads = _own_heads(student, teacher)
    if heads and student.hidden % heads:
        key = "heads" if student.heads else "hidden"
        given = student.heads or student.hidden
        yield (
            (*path, key),
            f"given {given}; allowed: heads that divide hidden ({student.hidden} / {heads} {_NOT_WHOLE})",
        )
    compared = stage.relation_heads is None and stage.objective != "embedding"
    if compared and student.heads and teacher.heads and student.heads != teacher.heads:
        what = f"given {student.heads}; allowed: {teacher.heads}, the heads of the teacher {stage.teacher!r}"
        yield (*path, "heads"), f"{what}, as they are compared one by one; or set relation_heads in the stage"


def _relation_heads(at: KeyPath, stage: Stage, teacher: _Known) -> Iterator[Problem]:
    given = stage.relation_heads
    sizes = {s.name: s.hidden for s in stage.students if s.hidden % (_own_heads(s, teacher) or 1) == 0}
    sizes |= {stage.teacher: teacher.hidden} if teacher.hidden else {}
    common = math.gcd(*sizes.values())
    if given and common % given:
        fits = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - given))
        listed = ", ".join(f"{name} {hidden}" for name, hidden in sizes.items())
        what = f"given {given}; allowed: a number that divides all hidden sizes ({listed})"
        yield (*at, "relation_heads"), f"{what}; {fits} would do"


def _fitting(stages: Mapping[int, Stage], index: int, place: int, teacher: _Known) -> str:
    """`; heads: 4 would do` for a student whose heads do not divide its hidden size: the nearest number after which
    nothing is wrong with it, and nothing more with the others."""
    stage = stages[index]
    student = stage.students[place]
    heads = _own_heads(student, teacher) or 1
    unit = math.lcm(heads, stage.relation_heads or 1)
    sizes = sorted(
        (unit * n for n in range(1, student.hidden // unit + 3)), key=lambda n: abs(n - student.hidden)
    )
    if student.heads and not teacher.heads and not stage.relation_heads:
        return f"; hidden: {sizes[0]} would do if the teacher has {heads} heads; if not, leave heads out"
    divisors = [number for number in range(1, student.hidden + 1) if student.hidden % number == 0]
    other_heads = (
        sorted(divisors, key=lambda n: (n != teacher.heads, abs(n - heads))) if student.heads else []
    )
    tries = [("heads", number) for number in other_heads[:8]] + [("hidden", number) for number in sizes[:8]]
    before = set(check_across(stages, None, advise=False))
    own: KeyPath = ("stages", index, "students", place)
    found: dict[int, str] = {}  # by the number of problems that are left
    for key, value in tries:
        changed = [*stage.students]
        changed[place] = student.model_copy(update={key: value})
        others = {**stages, index: stage.model_copy(update={"students": tuple(changed)})}
        after = set(check_across(others, None, advise=False))
        if after < before and not any(path[:4] == own for path, _ in after):
            found.setdefault(len(after), f"; {key}: {value} would do")
    return found[min(found)] if found else ""


def follows_from_another(error: ErrorDetails) -> bool:
    """Whether pydantic says this only because something inside was wrong, which it says as well."""
    if error["type"] == "too_short":  # it counts the sound items only
        return len(error["input"]) >= error["ctx"]["min_length"]
    return error["type"] == "default_factory_not_called"


def explain(error: ErrorDetails, written: str | None = None) -> str:
    """The text for one of pydantic's errors: what was given, what is allowed, did you mean.

    written: what the file has, shown in place of a value that came from the environment.
    """
    kind, given, path = error["type"], error["input"], error["loc"]
    if isinstance(given, str) and (variable := VARIABLE.search(given)) and not written:
        braced = f"${{{variable[1].strip('{}')}}}"
        return f"given {_show(given)}; only variables in braces have values, as {braced}; write the value, or {braced}"
    shown = _show(given if written is None else written)
    if kind == "missing":
        return f"missing; add it{_meaning(path)}"
    if kind == "extra_forbidden":
        return _unknown_key(path, given)
    allowed = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if kind in ("model_type", "model_attributes_type"):
        allowed = "a mapping of KEY: VALUE lines"
    elif kind == "tuple_type":
        allowed = "a list: [ITEM, …], or lines that begin with a dash"
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
    elif kind.startswith("bool"):
        allowed = "true or false"
    guess = suggest(given, re.findall(r"'([^']*)'", allowed), cutoff=0.75) if kind == "literal_error" else ""
    return f"given {shown}; allowed: {allowed}{guess}"


def _meaning(path: tuple[int | str, ...]) -> str:
    """The key's description in brackets, if the types have one."""
    above = [key for key in path[:-1] if isinstance(key, str)]
    section = SECTIONS.get(above[-1] if above else "")
    known = section.model_fields.get(str(path[-1])) if section else None
    return f" ({' '.join(known.description.split()).rstrip('.')})" if known and known.description else ""


RENAMED = {("compute", "reduction"): "gradient_sum"}  # (section, key of before): key


def _unknown_key(path: tuple[int | str, ...], given: object) -> str:
    above = [key for key in path[:-1] if isinstance(key, str)]
    here = above[-1] if above else ""
    key, allowed = str(path[-1]), list(SECTIONS[here].model_fields)
    if new := RENAMED.get((here, key)):
        return f"this key is called {new} now, with the same values; rename it"
    if key == "vocabulary":
        how = "make one with minilm shrink, and give its folder as teacher and data.tokenizer"
        return f"unknown key; a smaller vocabulary is that of a teacher: {how}"
    if not here:
        allowed += ["extends", "vars"]
    if here == "stages":
        allowed.insert(allowed.index("students"), "student")
        allowed.insert(allowed.index("teacher") + 1, "assistant")
    if here == "data":
        allowed[1:1] = CORPUS_PLACES
    if len(written := re.split("[:=]", key, maxsplit=1)) == 2:
        return f"unknown key; write {written[0]}: {written[1]}, with a colon and a space"
    elsewhere = [section or "the top" for section, kind in SECTIONS.items() if key in kind.model_fields]
    guess = (
        f"; it belongs under {' or '.join(elsewhere)}"
        if elsewhere
        else suggest(key, allowed, cutoff=0.75 if isinstance(given, dict) else 0.6)
    )
    if not here and not guess and isinstance(given, dict | list):
        guess = f" (what merge keys take from is called x-…, as x-{key})"
    return f"unknown key{guess}; allowed: {', '.join(allowed)}"


def suggest(given: object, allowed: Collection[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?`, or nothing."""
    if not isinstance(given, str) or not given:
        return ""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=cutoff)
    close = close or [word for word in allowed if len(given) > 1 and given in re.split("[-_]", word)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _show(value: object) -> str:
    if isinstance(value, dict):
        keys = [str(key) for key, inner in value.items() if inner is not None]
        return f"the keys {', '.join(keys)}" if keys else "nothing"
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
