"""python -m runtimes.transformers_server <folder> <host> <port>: `transformers serve`, mended."""

import os
import sys
from pathlib import Path

from runtimes.compat import mend_transformers_serve


def main() -> None:
    folder, host, port = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])
    from transformers.cli.serve import Serve

    mend_transformers_serve()
    # Of a path with an `@` it would take what follows for a revision.
    os.chdir(folder.parent)
    Serve(force_model=folder.name, host=host, port=port)


if __name__ == "__main__":
    main()
