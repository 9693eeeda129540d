"""lighteval's own command line, in an environment with nanotron too, and without the hub:

python -m eval_tasks accelerate "model_name=..." "piqa_cf|0" --custom-tasks eval_tasks/smollm3.py
"""

from eval_tasks import compat

compat.before_import()

from lighteval.__main__ import app  # noqa: E402

if __name__ == "__main__":
    app()
