"""The one exception that model/ raises for anything a person can put right.

Its text is a single line: what was given, what is allowed, what to do next. Bugs stay ordinary exceptions.
"""


class ModelError(Exception):
    """A teacher, student or objective that cannot be used as given."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """The text of another library's error for one of ours: no newlines, at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "…"
