"""The entrypoint of a KubeRay job, outside a cluster; how it stops its own job is in test_launch_ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minilm.orchestrator.launch.job_entrypoint import FINAL
from tests.rooms import ROOT


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["run", "none.yaml"], 2)])
def test_exit_codes_are_handed_on_and_final_ones_explained(tmp_path, arguments, code):
    command = [sys.executable, "-m", "minilm.orchestrator.launch.job_entrypoint", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("no retry cures exit code 2" in done.stderr) is (code == 2)
    if code == 2:
        first, last = done.stderr.splitlines()
        assert first.startswith("minilm: error: ") and last.endswith(first), (
            "the reason is the last line of the log"
        )


def test_what_no_retry_cures():
    assert sorted(FINAL) == [2, 4, 6]
