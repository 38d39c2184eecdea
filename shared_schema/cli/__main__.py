"""``python -m shared_schema.cli`` is ``r3``."""

import sys

from shared_schema.cli import main

sys.exit(main())
