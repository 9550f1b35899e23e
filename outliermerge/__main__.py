"""`python -m outliermerge`."""

import sys

from outliermerge.cli.main import main

sys.exit(main())
