"""``python -m agc`` is the command ``agc``."""

import sys

from agc.cli import main

sys.exit(main())
