"""Run scripts one after another in a launched process: `launched_stages.py FOLDER`, whose stages.json lists their
arguments.

Between two scripts the processes wait for each other, as a job script does between two launches; an exit status other
than 0 ends the process. Not a test itself.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(folder: Path) -> int:
    from utils.cli import run

    rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    for number, (script, *argv) in enumerate(json.loads((folder / "stages.json").read_text())):
        module = importlib.import_module(script)
        if status := run(lambda module=module, argv=argv: module.main(argv)):
            return status
        (folder / f"done-{number}-{rank}").touch()
        while len(list(folder.glob(f"done-{number}-*"))) < world:
            time.sleep(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
