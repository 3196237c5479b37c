"""The errors that a user can cause and mend.

    Exception
    └── UserError          one line: what was given, what is allowed, what to do next
        └── RecipeErrors   several such lines, all the problems of one recipe at once

The command line prints them as `minilm: error: …` and ends with exit code 2; anything else is a bug
and keeps its traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user gave can't be used. The message is one line."""


class RecipeErrors(UserError):
    """Every problem found in one recipe; `problems` holds one line for each, in the order of the file."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type["RecipeErrors"], tuple[tuple[str, ...]]]:
        """Ray carries exceptions between processes by pickling them with their own arguments."""
        return RecipeErrors, (self.problems,)
