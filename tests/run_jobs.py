"""Several run folders' jobs one after another in the same processes, to import nanotron once.

A first argument of `--device-type=cuda` makes a CPU take the fast step.
"""

import sys
from pathlib import Path

from nanotron_ext import compat
from nanotron_ext.job import Job
from nanotron_ext.trainer import SmolLM3Trainer

if __name__ == "__main__":
    compat.init_distributed()
    options = [word for word in sys.argv[1:] if word.startswith("--device-type=")]
    device_types = [word.partition("=")[2] for word in options]
    for folder in map(Path, sys.argv[1 + len(options) :]):
        SmolLM3Trainer(folder, Job.read(folder), *device_types).run()
