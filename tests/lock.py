"""What `make lock` pipes a report of pip through: the lines of requirements.lock.

PyTorch's companions for CUDA are left out: PyTorch pins each of them to one version itself, and its build for CPUs has
none.
"""

from __future__ import annotations

import json
import re
import sys

from packaging.utils import canonicalize_name
from packaging.version import Version

COMPANIONS = re.compile(r"nvidia-|cuda-|triton$|minilm-distiller$")

if __name__ == "__main__":
    found = [item["metadata"] for item in json.load(sys.stdin)["install"]]
    lines = {canonicalize_name(item["name"]): Version(item["version"]).public for item in found}
    print(
        "# What the image installs, made by `make lock`: the versions of the environment that the tests run in."
    )
    print(*(f"{name}=={lines[name]}" for name in sorted(lines) if not COMPANIONS.match(name)), sep="\n")
