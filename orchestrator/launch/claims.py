"""How many places of a cluster are a run's own, told to the other runs on it.

Ray knows what is free at this moment. Between two stages, and while workers are replaced, a run's places are free for
a moment; another run that waited could take them, and the first would end for lack of room after days. So each run
keeps a claim in the cluster's own key-value store. It counts while its driver is connected, so that a killed run's
ends with it, and says who holds what. Only runs of ours look at it: places that others take are seen as not free.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # between making a claim and the look whether another run made one at the same time


class Claim:
    """The claim of this process's run on the connected cluster. `holder`: what other runs say of it."""

    def __init__(self, holder: str):
        self.holder = holder
        self.resource, self.places, self.since, self.confirmed = "", 0, math.inf, False

    def ahead(self, resource: str) -> list[tuple[str, int]]:
        """Holder and number of the places of other runs that this one has to leave alone, earliest first.

        Confirmed claims go before those just made, then older ones before younger ones, so that of two runs which
        claim the same places at once one withdraws, and so does one of two when a cluster has lost nodes.
        """
        from minilm.orchestrator.launch.ray_private import own_job, read_claims

        own, found = own_job(), []
        mine = (not self.confirmed, self.since, own)
        for job, text in read_claims().items():
            claim = json.loads(text)
            rank = (not claim["confirmed"], claim["since"], job)
            if job != own and claim["resource"] == resource and rank < mine:
                found.append((rank, claim["holder"], claim["places"]))
        return [(holder, places) for _, holder, places in sorted(found)]

    def covers(self, resource: str, least: int) -> bool:
        """Has this run got `least` places already, from the stage before?"""
        return self.confirmed and self.resource == resource and self.places >= least

    def make(self, resource: str, places: int, now: float) -> None:
        """Claim places; to be confirmed after `SETTLE_SECONDS`, or withdrawn. now: seconds since the epoch."""
        self._write(resource=resource, places=places, since=now, confirmed=False)

    def confirm(self) -> None:
        self._write(confirmed=True)

    def resize(self, places: int) -> None:
        """Claim what the run uses now. A failure is logged: the head may be away."""
        if self.confirmed and places != self.places:
            try:
                self._write(places=places)
            except Exception as error:  # whatever Ray raises
                log.debug("the claim of places is not updated: %s", error)

    def withdraw(self) -> None:
        from minilm.orchestrator.launch.ray_private import remove_claim

        self.resource, self.places, self.since, self.confirmed = "", 0, math.inf, False
        remove_claim()

    def _write(self, **changes: Any) -> None:
        from minilm.orchestrator.launch.ray_private import write_claim

        record = vars(self) | changes
        write_claim(json.dumps(record))
        vars(self).update(changes)


def claimed_by_others(resource: str) -> int:
    """The places that other runs claim, asked in any process of a run: its controller is of the driver's job."""
    from minilm.orchestrator.launch.ray_private import own_job, read_claims

    claims = [json.loads(text) for job, text in read_claims().items() if job != own_job()]
    return sum(claim["places"] for claim in claims if claim["resource"] == resource)
