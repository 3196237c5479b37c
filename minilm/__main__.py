"""`python -m minilm` is the `minilm` command."""

import sys

from minilm.orchestrator.cli import main

sys.exit(main())
