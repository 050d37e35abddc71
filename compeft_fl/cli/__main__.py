"""``python -m compeft_fl.cli``: the command without its script."""

import sys

from compeft_fl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
