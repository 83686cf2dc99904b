"""``python -m nanodist``, as torchrun and the deepspeed launcher start it."""

import sys

from nanodist.cli import main

sys.exit(main())
