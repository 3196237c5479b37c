"""The one exception that users of the data layer meet.

A `DataError` is a single line: what was given, what is allowed, what to do next. The command line prints it
as `minilm: error: …` and exits with code 2. Whatever else is raised here is a defect of this package.
"""


class DataError(Exception):
    """Text, tokenizer, shard or argument that cannot be used; the message says how to go on."""
