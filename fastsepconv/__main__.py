"""`python -m fastsepconv` is `fastsepconv`."""

from __future__ import annotations

import sys

from fastsepconv.cli import main

sys.exit(main())
