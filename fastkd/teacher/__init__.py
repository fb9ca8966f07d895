"""The teacher's side, run once: what it is, the plan of the work, and the job that fills a cache."""
