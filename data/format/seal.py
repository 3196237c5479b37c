"""A JSON object that carries its own sha256, for a file that the manifest cannot pin because it tells of times.

The file's bytes are the object's canonical JSON with `sha256`, the hash of the same JSON without that key; whatever is
damaged or cut, spaces and line ends included, is noticed.
"""

import hashlib
import json
from typing import Any

_KEY = "sha256"


def sealed(record: dict[str, Any]) -> bytes:
    """The bytes of a file that holds `record`, which must be plain JSON."""
    return _json(record | {_KEY: hashlib.sha256(_json(record)).hexdigest()})


def unsealed(raw: bytes) -> dict[str, Any]:
    """The record in the bytes of a file. ValueError when they are not those that `sealed` gave."""
    whole = json.loads(raw)
    if not isinstance(whole, dict):
        raise ValueError("it is no JSON object")
    record = {key: value for key, value in whole.items() if key != _KEY}
    if raw != sealed(record):
        raise ValueError("its content does not have its sha256")
    return record


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
