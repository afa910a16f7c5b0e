"""The command `python -m jaxtrain.lm_eval`."""

import sys

from jaxtrain.lm_eval.command import main

if __name__ == "__main__":
    sys.exit(main())
