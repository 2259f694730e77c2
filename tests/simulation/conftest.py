"""Puts the simulation's own modules in reach, and adds the switch that rewrites its transcripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
