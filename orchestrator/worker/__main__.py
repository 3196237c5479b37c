"""`python -m minilm.orchestrator.worker STAGE.json` runs a stage without any launcher, alone or under torchrun."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from minilm.data.errors import DataError
from minilm.data.read.quarantine import QuarantineGrew
from minilm.model.errors import ModelError
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.lease import Superseded
from minilm.orchestrator.system.malloc import keep_freed_memory
from minilm.orchestrator.train.distributed import own_rank
from minilm.orchestrator.worker.errors import PeerFailed
from minilm.orchestrator.worker.loop import run_stage


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        print("usage: python -m minilm.orchestrator.worker STAGE.json", file=sys.stderr)
        return 2
    keep_freed_memory()
    try:
        spec = StageSpec.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
        if (
            own_rank() == 0
        ):  # before the ranks meet: a request to stop an earlier run is not meant for this one
            StageFolder(Path(spec.folder)).stop_request.unlink(missing_ok=True)
        return 0 if run_stage(spec) else 3
    except QuarantineGrew as error:
        print(f"minilm: stopped: {error}", file=sys.stderr)
        return 3
    except PeerFailed as error:
        print(f"minilm: stopped: {error}", file=sys.stderr)
        return UserError.exit_code
    except (UserError, DataError, ModelError, Superseded, OSError, json.JSONDecodeError) as error:
        print(f"minilm: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)


if __name__ == "__main__":
    sys.exit(main())
