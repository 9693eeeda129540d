"""The published suite for lighteval 0.13:

    lighteval accelerate "model_name=..." "piqa_cf|0" --custom-tasks eval_tasks/smollm3.py

To add a task: write a row in datasets.yaml, whose head explains the keys; add what is new in it to
FORMS and METRICS of tasks.py; name the task in a suite of recipes/eval/.

Needs lighteval and this checkout's ground/, none of the other engines. With EVAL_DATA=<folder> the
tasks read the datasets that lie there in place of the hub's (package_data.py makes some).
"""

import sys
from pathlib import Path

# lighteval's command line loads this file by its path: without this it could not import its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval_tasks import compat

compat.apply()

from eval_tasks.task_table import read_tasks  # noqa: E402
from eval_tasks.tasks import lighteval_task  # noqa: E402

TASKS_TABLE = [lighteval_task(task) for task in read_tasks().values()]
