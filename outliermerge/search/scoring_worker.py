"""The subprocess of a search that scores models by a Python function, or by texts.

worker_process.py starts it with a request as a line of JSON on standard input, which has the
scorer. Each further line names a model and the questions that it is asked.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.worker import telling
from outliermerge.search.workplace import Merged


def main() -> None:
    """Score models as the lines say."""
    request = json.loads(sys.stdin.readline())
    sys.path[:] = request["modules"]
    with telling(request["parent"]) as tell:
        import torch  # noqa: F401  now, since it is part of the start

        scorer: Any = pickle.loads(base64.b64decode(request["scorer"]))
        tell(event="ready")
        for line in sys.stdin:
            asked = json.loads(line)
            model = Merged(Path(asked["path"]), asked["model"], 0)
            try:
                tell(event="answered", answers=scorer.score(model, asked["questions"]))
            except OutlierMergeError as error:
                tell(event="failed", reason=error.marked)
