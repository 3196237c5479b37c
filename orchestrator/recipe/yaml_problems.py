"""What a YAML parser complains about, in words that say what to do, at the line where that is done.

The parser often notices a slip lines behind it: what was left open is told at the line where it was opened.
"""

import yaml

# a part of the parser's words: (what to do, whether it is done where the parser began, not where it stopped)
REMEDIES = {
    "could not find expected ':'": ("write KEY: VALUE here, with a space after the colon", True),
    "'\\t' that cannot start any token": ("that is a tab: indent with spaces", False),
    "that cannot start any token": ("put quotes around a value that begins with this character", False),
    "mapping values are not allowed here": (
        "put quotes around a value with ': ' in it, and begin the keys of a mapping in one column",
        False,
    ),
    "expected <block end>": (
        "begin the keys of a mapping in one column, and the dashes of a list, each with a space behind it",
        False,
    ),
    "expected ',' or": ("close what is opened here, or put a comma between its parts", True),
    "found unexpected end of stream": ("close the quotes that are opened here", True),
    "while scanning an alias": ("put quotes around a value that begins with *", True),
    "while scanning an anchor": ("put quotes around a value that begins with &", True),
    "found undefined alias": ("mark what it stands for with & and this name, further up", False),
    "found another document": ("keep one recipe a file, without a line ---", False),
}


def told(error: yaml.MarkedYAMLError) -> tuple[int, str]:
    """The line (0-based) and the sentence."""
    words = " ".join(f"{error.problem or error.context}".split())
    whole = f"{error.context} {error.problem}"
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark]
    for part, (remedy, at_beginning) in REMEDIES.items():
        if part in whole:
            return marks[-1 if at_beginning else 0].line, f"not valid YAML: {words}; {remedy}"
    return marks[0].line if marks else 0, f"not valid YAML: {words}"
