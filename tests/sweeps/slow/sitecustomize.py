"""With this folder on PYTHONPATH, the first start of some jobs takes its time over every step, so that a test can stop
it in the middle. SLOW="1:0.5 2:6" makes that half a second in task 1 of the array and six in task 2."""

import importlib.abc
import importlib.machinery
import os
import sys

TASK = os.environ.get("SLURM_ARRAY_TASK_ID", os.environ.get("SLURM_JOB_ID", ""))
PAUSES = dict(entry.split(":") for entry in os.environ.get("SLOW", "").split())
PAUSE = float(PAUSES.get(TASK, PAUSES.get("all", 0)))
PATCHED = "loramoe_train.data.stage"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != PATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import time

            steps = module.MixtureStage.steps

            def slow(self, **which):
                for step in steps(self, **which):
                    time.sleep(PAUSE)
                    yield step

            module.MixtureStage.steps = slow

        spec.loader.exec_module = exec_module
        return spec


if PAUSE and not int(os.environ.get("SLURM_RESTART_COUNT") or 0) and "SLURM_JOB_ID" in os.environ:
    sys.meta_path.insert(0, _Finder())
