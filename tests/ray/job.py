"""What a user submits as a job: a driver with a fixed (storage_path, name).

python tests/ray/job.py DIRECTORY [HOLD_AT]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ray.runs import fit

directory, *hold_at = sys.argv[1:]
fit(Path(directory), "run", **({"hold_at": int(hold_at[0])} if hold_at else {}))
