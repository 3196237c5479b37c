"""Where a recipe comes from: `minilm list` and `minilm copy` for those of the package, `minilm new` for others."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.verbs.arguments import add_json, add_verb

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from minilm.orchestrator.plan.cost import Machine, Work
    from minilm.orchestrator.plan.propose import Proposal, Setting
    from minilm.orchestrator.plan.wish import Wish
    from minilm.orchestrator.recipe.schema import Recipe

MEASURED_TOKENS = {"cpu": 1024, "cuda": 32768}  # of a step, where this machine's rate is measured


def add_list(verbs: Any) -> None:
    listed = add_verb(
        verbs,
        "list",
        "list the recipes that come with this package",
        "minilm list",
        "minilm list --json",
    )
    add_json(listed, "print a JSON object a recipe")
    listed.set_defaults(run=list_recipes)


def list_recipes(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.library import LIBRARY, packaged_recipes
    from minilm.orchestrator.system.text import text_table

    recipes = packaged_recipes()
    if options.json:
        for recipe in recipes:
            print(json.dumps(asdict(recipe), ensure_ascii=False))
        return 0
    rows = [("recipe", "students, layers x hidden", "teacher", "steps", "hours", "what it is for")]
    for one in recipes:
        sizes = ", then ".join(f"{s.layers} x {s.hidden}" for s in one.students)
        steps = f"{sum({s.stage: s.steps for s in one.students}.values()):,}"
        hours = one.hours.partition(",")[0].partition(": ")[0]
        rows.append((one.name, sizes, one.teacher, steps, hours, one.purpose))
    print(f"{text_table(rows)}\n\nThey lie in {LIBRARY}; one is brought here by: minilm copy NAME")
    return 0


def add_copy(verbs: Any) -> None:
    copy = add_verb(
        verbs,
        "copy",
        "bring a recipe that comes with this package here, to change it",
        "minilm copy quickstart",
        "minilm copy bert-l6-h384-ta --to recipes-of-mine",
    )
    copy.add_argument("name", metavar="NAME", help="as `minilm list` has it")
    copy.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="(default: the current one)")
    copy.set_defaults(run=copy_recipe)


def copy_recipe(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.library import copy_recipe

    first, *others = copy_recipe(options.name, options.to)
    beside = f", and what it extends beside it: {', '.join(map(str, others))}" if others else ""
    print(f"{first} is yours{beside}; look at it with: minilm check {first}")
    return 0


QUESTIONS = {  # what is asked for where there is a terminal and these flags are missing
    ("teacher",): "Teacher: a model's folder, package:NAME/FOLDER or a hub id",
    ("text",): "Text to learn from: files, folders or globs",
    ("use",): "Use of the student: fine-tuning or embeddings",
    ("target",): "At most so many parameters, as 22M, or milliseconds for a text on this machine, as 10ms",
    ("hardware", "budget"): "Hardware and time of training, as here 8h (this machine) or h100x8 2d",
}


def add_new(verbs: Any) -> None:
    new = add_verb(
        verbs,
        "new",
        "write a recipe for your teacher, text and hardware, by five questions or by flags",
        "minilm new mine.yaml",
        "minilm new mine.yaml --teacher ./encoder --text corpus --use fine-tuning --target 22M --hardware h100x8 "
        "--budget 2d",
        "minilm new search.yaml --use embeddings --target 10ms",
    )
    new.add_argument("out", type=Path, metavar="OUT.yaml", help="the recipe; nothing may lie there yet")
    new.add_argument("--teacher", metavar="MODEL", help="a folder, package:NAME/FOLDER or a hub id")
    new.add_argument(
        "--text", action="append", metavar="FILES", help="files, folder or glob; may be repeated"
    )
    new.add_argument("--use", metavar="USE", help="fine-tuning or embeddings")
    new.add_argument(
        "--target", metavar="MOST", help="of the student: parameters, as 22M, or milliseconds, as 10ms"
    )
    new.add_argument("--hardware", metavar="DEVICExN", help="here (measured), or by data sheet, as h100x8")
    new.add_argument("--budget", metavar="TIME", help="of training, at most: 90m, 24h, 3d")
    new.add_argument(
        "--shape", metavar="LxH", help="one of those that are proposed, as 6x384 (default: the first)"
    )
    new.set_defaults(run=new_recipe)


def new_recipe(options: argparse.Namespace) -> int:
    from minilm.orchestrator.plan.wish import recipe_file

    out = recipe_file(options.out)
    wish, asked = wish_of(options, out)
    from minilm.orchestrator.plan.propose import look_at, propose, recipe_text

    device, precision = device_of(wish)
    setting = look_at(wish, out)
    proposals, machine = propose(
        setting,
        device,
        precision,
        lambda recipe, work: machine_of(wish, recipe, work, device, precision),
        latency,
    )
    print(proposals_text(setting, proposals, machine))
    chosen = choose(proposals, options.shape, asks=asked)
    for warning in write_checked(out, recipe_text(setting, proposals, chosen, machine)):
        print(f"warning: {warning}")
    file = shlex.quote(str(out))
    print(
        f"{out} is yours, for a student of {chosen.draft.shape}; look at it with: minilm check {file}; start it with: "
        f"minilm run {file} --workdir runs/{wish.name}"
    )
    return 0


def wish_of(options: argparse.Namespace, out: Path) -> tuple[Wish, bool]:
    """The flags, and where there is a terminal the answers in place of missing ones; and whether there were."""
    from minilm.orchestrator.plan import wish

    read: dict[str, Callable[[Any], Any]] = {
        "teacher": lambda given: wish.teacher_reference(given, out.parent),
        "text": lambda given: wish.text_paths(given, out.parent),
        "use": wish.use_of,
        "target": wish.target_of,
        "hardware": wish.hardware_of,
        "budget": wish.budget_of,
    }
    missing = [flag for flag in read if getattr(options, flag) is None]
    found = {flag: read[flag](getattr(options, flag)) for flag in read if flag not in missing}
    if missing and not (sys.stdin and sys.stdin.isatty()):  # None: closed
        names = ", ".join(f"--{flag}" for flag in missing)
        raise UserError(f"{names}: not given, and there is no terminal to ask at; see minilm new --help")
    for flags, question in QUESTIONS.items():
        if asked := [flag for flag in flags if flag in missing]:
            found |= ask(asked, question, read)
    device, workers = found["hardware"]
    wished = wish.Wish(
        name=wish.recipe_name(out),
        teacher=found["teacher"],
        text=found["text"],
        use=found["use"],
        target=found["target"],
        hardware=device,
        workers=workers or devices_here(),
        budget=found["budget"],
    )
    return wished, bool(missing)


def ask(flags: list[str], question: str, read: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The answers to a question by their flags; it is asked again until they can be read."""
    names = ", ".join(f"--{flag}" for flag in flags)
    while True:
        try:
            given = input(f"{question} ({names}): ")
        except EOFError:
            raise UserError(f"{names}: not given; nothing is written") from None
        try:
            words: list[Any] = shlex.split(given)
            answers = [words] if flags == ["text"] and words else words
            if len(answers) != len(flags):
                raise UserError(f"given {given!r}; allowed: {len(flags)} word{'s' * (len(flags) > 1)}")
            return {flag: read[flag](answer) for flag, answer in zip(flags, answers, strict=True)}
        except (UserError, ValueError) as error:  # ValueError: of a quotation mark that is not closed
            print(error)


def devices_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def device_of(wish: Wish) -> tuple[str, str]:
    """Device and precision that the training is reckoned for."""
    import torch

    from minilm.orchestrator.plan.wish import HERE
    from minilm.orchestrator.train.numerics import choose_precision

    if wish.hardware != HERE or torch.cuda.is_available():
        return "cuda", "bfloat16"
    return "cpu", choose_precision("auto", None, torch.device("cpu"))


def machine_of(wish: Wish, recipe: Recipe, work: Work, device: str, precision: str) -> Machine:
    """The hardware: by its data sheet, or this machine by a few steps of the stage."""
    from minilm.orchestrator.plan.cost import Machine, flops_per_second
    from minilm.orchestrator.plan.hardware import machine_by_sheet
    from minilm.orchestrator.plan.wish import HERE

    if wish.hardware != HERE:
        return machine_by_sheet(wish.hardware, precision)
    import psutil
    import torch

    from minilm.orchestrator.bench.stage_rate import stage_tokens_per_second

    rows = max(1, MEASURED_TOKENS[device] // work.seq_len)
    rate = stage_tokens_per_second(
        recipe, replace(work, batch=rows, micro_batch=rows), torch.device(device), precision
    )
    memory = psutil.virtual_memory().total
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    reached = flops_per_second(work, rate)
    source = f"{reached / 1e9:,.0f} GFLOP/s, measured on this machine's {device}"
    return Machine(reached, device, precision, memory, source)


def latency(model: PreTrainedModel) -> float:
    """Milliseconds for one text of 128 tokens on this machine, the median."""
    from minilm.orchestrator.evaluation.speed import row_milliseconds

    return row_milliseconds(model)


def proposals_text(setting: Setting, proposals: Sequence[Proposal], machine: Machine) -> str:
    """What was found of teacher, text and hardware, and the proposals as a table."""
    from minilm.orchestrator.plan.report import long
    from minilm.orchestrator.system.text import text_table

    teacher, rows, wish = setting.teacher, setting.rows, setting.wish
    text = "not looked at, because the teacher's tokenizer is not here"
    if rows.count:
        kind = "sentences" if rows.packing == "sentence" else "texts"
        text = (
            f"about {rows.count:,.0f} rows of {rows.seq_len} tokens; 95 % of its {kind} have at most "
            f"{rows.longest:,}"
        )
    lines = [
        f"teacher   {wish.teacher}: {teacher.architecture}, {teacher.layers} x {teacher.hidden}, "
        f"{teacher.heads} heads, {teacher.vocab_size:,} tokens, rows of at most {teacher.max_tokens}",
        f"text      {text}",
        f"hardware  {wish.workers} x {machine.source}",
    ]
    heads = ["", "layers x hidden", "parameters", "stages", "steps x rows", "FLOP of training", "time"]
    if timed := proposals[0].milliseconds is not None:
        heads.append("ms a text")
    table = [heads]
    for number, one in enumerate(proposals, start=1):
        row = [
            f"{number}",
            one.draft.shape,
            f"{one.parameters / 1e6:.1f} M",
            ", ".join(
                f"{plan.work.students[0].layers} x {plan.work.students[0].hidden}" for plan in one.plans
            ),
            f"{one.draft.steps:,} x {one.draft.batch}",
            f"{one.flops:.2e}",
            long(one.seconds),
        ]
        table.append([*row, f"{one.milliseconds:.1f}"] if timed else row)
    return "\n".join([*lines, "", text_table(table), ""])


def choose(proposals: Sequence[Proposal], given: str | None, *, asks: bool) -> Proposal:
    """The one of the shape that is given, or by its number where the user `asks` to be asked; else the first."""
    shapes = {one.draft.shape.replace(" ", ""): one for one in proposals}
    if given is not None:
        if given.replace(" ", "") not in shapes:
            raise UserError(f"--shape: given {given!r}; allowed here: {', '.join(shapes)}")
        return shapes[given.replace(" ", "")]
    numbers = {str(number): one for number, one in enumerate(proposals, start=1)} | {"": proposals[0]}
    while asks and len(proposals) > 1:
        try:
            answer = input("Which one (--shape), by its number [1]: ").strip()
        except EOFError:
            raise UserError("--shape: not given; nothing is written") from None
        if answer in numbers:
            return numbers[answer]
        print(f"given {answer!r}; allowed: 1 to {len(proposals)}")
    return proposals[0]


def write_checked(out: Path, text: str) -> list[str]:
    """Write the recipe whole, and only one that `minilm check` takes. Returns what check would warn of."""
    from minilm.orchestrator.recipe.load import read_recipe
    from minilm.orchestrator.verbs.check import findings_here

    problems, warnings = findings_here(read_recipe(out, text=text)[0])
    if problems:
        raise RecipeErrors(problems)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}; give another name") from None
    return warnings
