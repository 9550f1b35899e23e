"""`python -m outliermerge`."""

import sys

from outliermerge.cli import main

sys.exit(main())
