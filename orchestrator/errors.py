"""The errors that end a run, each with the exit code of the `minilm` command.

    Exception
    └── UserError                    2   a recipe, input or setting that can't be used
        ├── RecipeErrors             2   all the problems of one recipe, a line each
        ├── Stopped                  3   stopped on request; the same command goes on
        ├── NoProgress               4   the same step failed again and again
        ├── LeaseHeld                6   another process works in the work directory
        └── InfrastructureError     10   machines, Ray or storage gave up; the same command goes on

Messages are one line: what was given, what is allowed, what to do next. The command line prints them as
`minilm: error: …`; anything else is a bug and keeps its traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user gave can't be used."""

    exit_code = 2


class RecipeErrors(UserError):
    """Every problem found in one recipe; `problems` holds one line for each, in the order of the file."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type["RecipeErrors"], tuple[tuple[str, ...]]]:
        """Exceptions are pickled with `args`, which is the joined text here and not the problems."""
        return RecipeErrors, (self.problems,)


class Stopped(UserError):
    """The run was asked to stop and did, at a checkpoint."""

    exit_code = 3


class NoProgress(UserError):
    """The run can't get past a step."""

    exit_code = 4


class LeaseHeld(UserError):
    """The work directory belongs to another live process."""

    exit_code = 6


class InfrastructureError(UserError):
    """Machines, the cluster or storage failed more often than the run may bear."""

    exit_code = 10
