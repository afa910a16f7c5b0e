"""The command `python -m jaxtrain.report`."""

import sys

from jaxtrain.report.page import main

if __name__ == "__main__":
    sys.exit(main())
