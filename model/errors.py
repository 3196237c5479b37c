"""The one exception that model/ raises for anything a person can put right.

Its text is a single line: what was given, what is allowed, what to do next. Bugs stay ordinary exceptions.
"""


class ModelError(Exception):
    """A teacher, student or objective that cannot be used as given."""
