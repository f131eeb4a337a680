"""``python -m agc_conformance.compiled``."""

import sys

from agc_conformance.compiled.measure import main

if __name__ == "__main__":
    sys.exit(main())
