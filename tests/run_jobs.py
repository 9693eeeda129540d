"""Several run folders' jobs one after another in the same processes, to import nanotron once."""

import sys
from pathlib import Path

from nanotron_ext import compat
from nanotron_ext.job import Job
from nanotron_ext.trainer import SmolLM3Trainer

if __name__ == "__main__":
    compat.init_distributed()
    for folder in map(Path, sys.argv[1:]):
        SmolLM3Trainer(folder, Job.read(folder)).run()
