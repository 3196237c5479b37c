"""The tasks of a build by name."""

from collections.abc import Callable
from typing import Any

from minilm.data.builder.sort import sort
from minilm.data.builder.tokenization import tokenize
from minilm.data.builder.write import write

TASKS: dict[str, Callable[..., Any]] = {"tokenize": tokenize, "sort": sort, "write": write}
