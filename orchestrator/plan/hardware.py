"""Devices by the numbers of their vendor's data sheets, for a plan before there is a machine.

Peaks are of dense matrix products (NVIDIA prints the bfloat16 ones with sparsity, which is twice as much and of no use
here). How much of a peak a step reaches is an assumption, `SHARE_OF_PEAK`, and printed as such: nothing here was
measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.plan.cost import Machine

SHARE_OF_PEAK = (
    0.25  # large models reach 0.35 to 0.55 of a peak; small encoders, with their short products, less
)


@dataclass(frozen=True)
class Device:
    """bfloat16, float32: peak operations a second. memory: bytes. link: bytes a second to another device of the same
    machine, each way. sheet: where the numbers stand."""

    bfloat16: float
    float32: float
    memory: float
    link: float
    sheet: str


DEVICES = {
    "h200": Device(989e12, 67e12, 141e9, 450e9, "NVIDIA H200 data sheet (SXM, NVLink)"),
    "h100": Device(989e12, 67e12, 80e9, 450e9, "NVIDIA H100 data sheet (SXM, NVLink)"),
    "h100-pcie": Device(756e12, 51e12, 80e9, 64e9, "NVIDIA H100 data sheet (PCIe 5)"),
    "a100": Device(312e12, 19.5e12, 80e9, 300e9, "NVIDIA A100 data sheet (SXM, 80 GB, NVLink)"),
    "l40s": Device(362e12, 91.6e12, 48e9, 32e9, "NVIDIA L40S data sheet (PCIe 4)"),
    "l4": Device(121e12, 30.3e12, 24e9, 32e9, "NVIDIA L4 data sheet (PCIe 4)"),
}


def parse_hardware(text: str) -> tuple[str, int]:
    """ "h100x8" → ("h100", 8), the name of a row of `DEVICES` and how many. Raises `UserError`."""
    found = re.fullmatch(r"(?P<name>.+?)(?:x(?P<count>[1-9][0-9]{0,4}))?", text.lower())
    if found is None or found["name"] not in DEVICES:
        raise UserError(
            f"--hardware: given {text!r}; allowed: {', '.join(DEVICES)}, each also with a number, as h100x8; "
            f"for another device, --measure on it"
        )
    return found["name"], int(found["count"] or 1)


def machine_by_sheet(
    name: str, precision: str, *, share: float | None = None, bandwidth: float | None = None
) -> Machine:
    """A row of `DEVICES`, with `share` of its peak (default: `SHARE_OF_PEAK`) and bytes a second between two of it."""
    sheet, share = DEVICES[name], share or SHARE_OF_PEAK
    peak = sheet.bfloat16 if precision == "bfloat16" else sheet.float32
    source = (
        f"{share:.0%} of {peak / 1e12:,.4g} TFLOP/s, {name}'s peak of dense {precision} products "
        f"({sheet.sheet}); that a step reaches so much is an assumption"
    )
    return Machine(share * peak, "cuda", precision, sheet.memory, source, bandwidth=bandwidth or sheet.link)
