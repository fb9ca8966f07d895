"""Everything to measure on a GPU in one command, on a machine with torch, triton, numpy and pytest alone.

    python bench/gpu_day.py --deadline 540 --json OUT           # once more to go on with what is left
    python bench/gpu_day.py --deadline 540 --json OUT --peers   # other packages, in a second call
    python bench/gpu_day.py --toy --json OUT                    # tiny sizes on a CPU, interpreted: does it run?

Exit status: 0 if all is done and every bound holds, 1 if a bound is missed, a test fails or a step cannot run, 3 if the
deadline came first.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("bare.py")))["use_checkout"]()
    from fastkd.bench.first_day import main

    sys.exit(main())
