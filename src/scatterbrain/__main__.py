"""``python -m scatterbrain``."""

import sys

from scatterbrain.cli import main

sys.exit(main())
