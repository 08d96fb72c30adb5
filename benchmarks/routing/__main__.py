"""`python -m benchmarks.routing`."""

import sys

from benchmarks.routing.report import main

sys.exit(main())
