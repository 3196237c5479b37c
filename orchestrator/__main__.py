"""`python -m orchestrator` is the `minilm` command."""

import sys

from orchestrator.cli import main

sys.exit(main())
