"""stub"""

from outliermerge.cli.parts import Command

COMMAND = Command(
    summary="x", examples=("outliermerge convert-config merge.yaml",), run=lambda o: 0
)
