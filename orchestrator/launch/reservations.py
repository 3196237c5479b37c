"""The resources that Ray Train reserves for a stage on a cluster that outlives the driver.

Ray keeps a dead driver's reservation for 180 s, and the next run would wait that long for its own machines. So a
driver notes what it reserves in the stage's folder, and the next driver of the same run withdraws it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from minilm.orchestrator.stage.folder import RunFolder, StageFolder
from minilm.orchestrator.system.files import read_json, write_json

log = logging.getLogger(__name__)

RESERVATION = "reservation.json"


def note_reservation(folder: StageFolder, requester: str) -> None:
    write_json(folder.root / RESERVATION, {"requester": requester})


def forget_reservation(folder: StageFolder) -> None:
    """Remove the note of a stage whose workers have ended: Ray has withdrawn the reservation itself."""
    (folder.root / RESERVATION).unlink(missing_ok=True)


def noted_reservations(run: RunFolder) -> list[Path]:
    """The notes in all stages of a run: a dead driver may have worked at another stage than the next one."""
    return sorted(run.root.glob(f"stages/*/{RESERVATION}"))


def cancel_reservations(run: RunFolder) -> None:
    """Withdraw what is noted, on the connected cluster. A failure is logged: the run then starts later, not wrongly."""
    for path in noted_reservations(run):
        record = read_json(path)
        if record is None:
            continue
        try:
            from minilm.orchestrator.launch.ray_private import cancel_reservation

            cancel_reservation(record["requester"])
            path.unlink(missing_ok=True)
        except Exception as error:  # whatever Ray raises, or its private module that has moved
            log.warning(
                "the reservation of an earlier run could not be cancelled (%s): it ends within 180 s", error
            )
