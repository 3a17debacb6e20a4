"""lm-eval's command without the index of the tasks that it ships: python -m ... run OPTIONS.

The index takes ten seconds of each start, and tasks of ``--include_path`` do not need it.
"""

import functools

from lm_eval import tasks
from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
    cli_evaluate()
