"""``python -m cogview``."""

import sys

from cogview.cli.main import main

sys.exit(main())
