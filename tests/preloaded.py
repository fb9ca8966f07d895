"""What the processes of forked.py find imported. The server that they are forked from imports it, once."""

import gc
import os
from importlib import import_module

# forked.py has put the folder of the tests before what was there
_, _, _others = os.environ["PYTHONPATH"].partition(os.pathsep)
os.environ.pop("PYTHONPATH")
if _others:
    os.environ["PYTHONPATH"] = _others

gc.disable()  # what is imported stays: a quarter of the time would go into looking for garbage among it
for _name in (
    "train_jobs",
    "train_cases",
    "fastkd.train.api",
    "fastkd.evaluate.api",
    "fastkd.generations.api",
    "cache_cases",
    "cache_writer",
    "transformers.models.llama.modeling_llama",
    "fastkd.train.mutual",
    "pandas",  # which Arrow imports where it is there
):
    try:
        import_module(_name)
    except ImportError:  # who needs it says so
        continue
gc.freeze()
gc.enable()
