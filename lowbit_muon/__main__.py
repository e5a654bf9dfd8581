"""`python -m lowbit_muon` is `lowbit-muon`."""

import sys

from lowbit_muon.tools.cli import main

sys.exit(main())
