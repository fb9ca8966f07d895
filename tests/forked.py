"""Processes forked from one that has imported what tests need: each begins at once, and as a fresh process does."""

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train_jobs", "train_cases", "fastkd.train.api", "fastkd.evaluate.api", "cache_cases", "cache_writer"]
)
