"""`python -m tests.soak RECIPE.yaml`, from the checkout; see docs/soak.md."""

import sys

from tests.soak.soak import main

sys.exit(main())
