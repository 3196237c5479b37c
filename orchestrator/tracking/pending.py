"""The small file behind tracking, WORKDIR/tracking.json: whether a run has ended with something MLflow was not told.

Imports no MLflow, so that `minilm run` on a finished work directory can ask in a millisecond; the telling itself is
`tracking.flush_pending`.
"""

from pathlib import Path

from minilm.orchestrator.system.files import read_json

STATE_FILE = "tracking.json"


def num_pending(workdir: Path) -> bool:
    """True if notes are left to tell. False also where the file is damaged: nothing in it can be told."""
    try:
        state = read_json(workdir / STATE_FILE)
    except ValueError:
        return False
    return isinstance(state, dict) and bool(state.get("notes"))
