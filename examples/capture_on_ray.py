r"""A job that fills a cache on a Ray cluster. Its arguments are those of `fastkd capture --ray`:

    ray job submit --working-dir . --runtime-env-json '{"pip": ["fastkd[cloud,hf,ray]"]}' -- \
        python examples/capture_on_ray.py --teacher Qwen/Qwen3-8B --data corpus.parquet --out s3://bucket/cache

The exit status is 0 when the cache is complete, and 75 when work remains: submit the job again, and it continues.
"""

import sys

sys.argv[1:1] = ["capture", "--ray"]

from fastkd.__main__ import run  # noqa: E402  (it looks at the arguments)

if __name__ == "__main__":
    run()
