"""The published suite for lighteval 0.13:

    lighteval accelerate "model_name=..." "piqa_cf|0" --custom-tasks eval_tasks/smollm3.py

Needs lighteval alone, none of this project's other engines. With EVAL_DATA=<folder> the tasks read
the datasets that lie there (local_data.py makes some from packages) in place of the hub's.
"""

import sys
from pathlib import Path

# The command line loads this file by its path: its siblings are found from the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval_tasks import compat

compat.apply()

from eval_tasks import base, instruct, multilingual  # noqa: E402

TASKS_TABLE = [*base.TASKS, *instruct.TASKS, *multilingual.TASKS]
