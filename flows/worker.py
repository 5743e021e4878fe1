"""Prefect's worker, as a process that ends with the one that started it."""

import runpy
import sys

from flows.server import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    sys.argv = ["prefect", "worker", "start", *sys.argv[1:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
