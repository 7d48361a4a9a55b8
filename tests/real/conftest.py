"""Makes the modules beside the tests importable (`whole_runs`, `kill_runs`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
