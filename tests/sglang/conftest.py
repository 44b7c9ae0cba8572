"""The fast tests here need ep_backend alone; those marked seam fetch SGLang's sources."""

import sys
from pathlib import Path

# The helper modules of this folder, which is no package.
sys.path.append(str(Path(__file__).parent))
