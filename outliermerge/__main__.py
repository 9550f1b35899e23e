"""`python -m outliermerge`."""

import sys

try:
    from outliermerge.cli.main import main

    code = main()
except KeyboardInterrupt:  # while the imports are made
    code = 130
sys.exit(code)
