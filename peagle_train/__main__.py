"""`python -m peagle_train` and `accelerate launch -m peagle_train`: what `peagle-train` is, where modules are launched."""

import sys

from peagle_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
