"""`minilm` as the entrypoint of a KubeRay RayJob: python -m minilm.orchestrator.launch.job_entrypoint run …

KubeRay retries every job that fails, each time with a new cluster, up to `backoffLimit` times. A recipe that can't be
used, a step that fails again and again, or a work directory that another run holds would end so again. A job that was
stopped is not retried, so here such a run stops its own job: `kubectl get rayjob` then shows STOPPED and Complete, and
the last lines of `kubectl logs job/NAME` why. All other exit codes are handed on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from minilm.orchestrator.errors import LeaseHeld, NoProgress, UserError
from minilm.orchestrator.system.text import one_line

FINAL = {error.exit_code for error in (UserError, NoProgress, LeaseHeld)}
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # of a process that `ray job submit` started
STOP_SECONDS = 120  # until Ray has stopped the job


def main(arguments: Sequence[str]) -> int:
    """Run `minilm` with these arguments, and return what this process shall end with."""
    stopped = threading.Event()
    # Ray sends these to the run too, whose exit code is what counts
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    command = [sys.executable, "-m", "minilm", *arguments]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert run.stderr
    last = ""
    for line in run.stderr:
        sys.stderr.write(line)
        last = line.strip() or last
    code = run.wait()
    if code not in FINAL or stopped.is_set():
        return code
    told = f"minilm: no retry cures exit code {code}, so this job is stopped for good: {last}"
    print(told, file=sys.stderr, flush=True)
    if stop_own_job():
        stopped.wait(STOP_SECONDS)  # ending before Ray does it would make a failed job of it
    return code


def stop_own_job() -> bool:
    """Ask the cluster's job server to stop the job that this process belongs to; False where that is not possible."""
    job = json.loads(os.environ.get(JOB, "{}")).get("metadata", {}).get("job_submission_id")
    if job is None:
        return False
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient().stop_job(job)
    except Exception as error:  # whatever Ray raises: then the job fails, and is tried again
        print(f"minilm: the job server does not stop this job: {one_line(error)}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
