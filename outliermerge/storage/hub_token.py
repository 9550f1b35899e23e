"""The token of the hub, looked at before a client would show it in an error about its headers."""

from __future__ import annotations

import os
import re

from outliermerge.errors import OutlierMergeError

_KINDS = {
    "a line break": r"[\r\n]",
    "a space or a tab": r"[ \t]",
    "a control character": "[\0-\x1f]",
}


def hub_token() -> str | None:
    """Return the token of HF_TOKEN or `hf auth login`; None if there is none.

    Raises:
        OutlierMergeError: it has a character that no token has; it is not shown.
    """
    import huggingface_hub as hub

    token = hub.get_token()
    # The client takes line breaks out of the middle of a token.
    text = os.environ.get("HF_TOKEN", "").strip() or token or ""
    if not re.fullmatch("[!-~]*", text):
        found = (kind for kind, pattern in _KINDS.items() if re.search(pattern, text))
        raise OutlierMergeError(
            f"the token of the hub has {next(found, 'a character that is not ASCII')} in it, and "
            "no token has: set HF_TOKEN to the token and nothing else, or run `hf auth login` again"
        )
    return token
