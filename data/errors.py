"""The errors that users of the data layer see: `DataError`, and the two kinds of it that the code tells apart.

A `DataError` is a single line: what was given, what is allowed, what to do next. The command line prints it
as `minilm: error: …` and exits with code 2. Any other exception is a defect of this package
(or `read.quarantine.QuarantineGrew`, which asks for a new start).

    DataError
    ├── DamageError    a shard is damaged
    └── OriginError    an object behind a URL is missing, or is not what the manifest pins
"""


class DataError(Exception):
    """A text, tokenizer, shard or argument cannot be used; the message says what to do next."""


class DamageError(DataError):
    """`shard` (its number) is damaged."""

    def __init__(self, text: str, shard: int):
        super().__init__(text, shard)
        self.shard = shard

    def __str__(self) -> str:
        return str(self.args[0])


class OriginError(DataError):
    """Fetching the object again would not help."""
