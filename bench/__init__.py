"""What is fast, against what, measured how: imported as fastkd.bench, run by `fastkd bench`.

    suites.py ─ bench_*.py ─▶ cases ─ harness.py, limits.py ─▶ table.py ─▶ Recording ─ check.py, results.py, page.py

A recording is one suite's rows with hardware and versions; `recorded/` holds those that `--check` compares with.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler logs every start and stop
