"""A token of the hub that no header can have is refused, and not shown."""

from __future__ import annotations

import pytest

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.hub_token import hub_token


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("hf_secret\nhf_other", "a line break"),
        ("hf_secret\r\nhf_other", "a line break"),
        ("hf_secret hf_other", "a space or a tab"),
        ("hf_secret\x1bhf_other", "a control character"),
        ("hf_secreté", "a character that is not ASCII"),
    ],
)
def test_what_is_wrong_with_it_is_told(
    monkeypatch: pytest.MonkeyPatch, token: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutlierMergeError, match=said) as caught:
        hub_token()
    assert "set HF_TOKEN to the token" in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", " "])
def test_what_stands_at_its_end_does_no_harm(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_token{end}")
    assert hub_token() == "hf_token"
