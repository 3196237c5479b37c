"""Values of command-line options that argparse has no type for."""

from __future__ import annotations

import argparse


def positive_whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: a whole number above 0")
    return int(text)
