"""What is secret in an address is taken out of it where it comes in."""

from __future__ import annotations

import pytest

from outliermerge.storage.addresses import (
    file_name,
    inside,
    is_address,
    lacks_secrets,
    with_secrets,
    without_secrets,
)

SECRET = "c0ffee"
ADDRESSES = (
    f"https://me:{SECRET}@host/model",
    f"https://{SECRET}@host:8080/a.safetensors",
    f"https://host/a.safetensors?X-Amz-Algorithm=AWS4&X-Amz-Credential={SECRET}&X-Amz-Expires=9",
    f"https://host/a.safetensors?x-amz-signature={SECRET}",
    f"https://host/a?X-Amz-Security-Token={SECRET}&partNumber=1",
    f"https://account.blob.core.windows.net/c/a?sv=2024&sp=r&sig={SECRET}",
    f"https://storage.googleapis.com/b/a?X-Goog-Signature={SECRET}&GoogleAccessId={SECRET}",
    f"https://cdn/a?Policy={SECRET}&Signature={SECRET}&Key-Pair-Id={SECRET}",
    f"HTTPS://host/a?token={SECRET}",
    f"http://host/a?access_token={SECRET}&api_key={SECRET}&password={SECRET}",
    f"s3://{SECRET}:{SECRET}@bucket/model",
    f"https://me:{SECRET}'{SECRET}@host/model",
    f"https://host/a?apikey={SECRET}&client_secret={SECRET}&passwd={SECRET}&jwt={SECRET}",
    f"https://host/a?hdnts=exp=1~hmac={SECRET}&credential={SECRET}",
    f"https://host/a?token=ab/{SECRET}/cd==&v=1",
    f"https://me:p@{SECRET}@host/a",
    f"https://host/a;token={SECRET}/model",
    f"https://host/a;v=1;sig={SECRET}",
    f"https://host/a?v=1;token={SECRET}",
    f"https://host/a#token={SECRET}",
    f"https://host/a?v=1#access_token={SECRET}&x=1",
    f"https://host/a?X%2DAmz-Signature={SECRET}",
    f"https://proxy/get?url=https://me:{SECRET}@host/a",
    f"https://proxy/get?url=https://host/a?sig={SECRET}&v=1",
    f"https://proxy/get?url=https%3A%2F%2Fme%3A{SECRET}%40host%2Fa&v=1",
    f"https://proxy/get?url=https%3A%2F%2Fhost%2Fa%3Fsig%3D{SECRET}",
    f"https://proxy/get?url=https%253A%252F%252Fhost%252Fa%253Ftoken%253D{SECRET}",
    f"https://proxy/https://me:{SECRET}@host/a",
    f"https://proxy/https%3A%2F%2Fhost%2Fa%3Ftoken%3D{SECRET}/model",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_secret_is_shown_and_none_is_lost(address: str) -> None:
    text = f'models: [{{"model": "{address}"}}, org/name]'
    shown = without_secrets(text)
    assert SECRET not in shown
    assert without_secrets(shown) == shown
    alone = without_secrets(address)
    assert with_secrets(alone).lower() == address.lower()
    inner = inside(alone, "config.json")
    assert SECRET not in inner
    assert SECRET in with_secrets(inner)


@pytest.mark.parametrize(
    "address",
    [
        "https://host/a?revision=main",
        "https://host/a?expires=1&next=https%3A%2F%2Fhost%2Fb%3Fv%3D1",
        "https://host/a;v=1/b#part=2",
        "s3://bucket/key=1/token=2/model",
        "s3://bucket/a b/model",
        "hf://org/name@v1",
    ],
)
def test_an_address_without_secrets_stays_as_it_is(address: str) -> None:
    assert without_secrets(f"at {address} and") == f"at {address} and"
    assert not lacks_secrets(address)


def test_addresses_that_differ_only_in_secrets_stay_apart() -> None:
    addresses = [
        *(f"https://host/two.safetensors?key={SECRET}{number}" for number in range(3)),
        *(f"https://user:{SECRET}{number}@host/two" for number in range(3)),
    ]
    shown = [without_secrets(address) for address in addresses]
    assert len(set(shown)) == len(addresses)
    assert [with_secrets(each) for each in shown] == addresses
    assert [without_secrets(each) for each in (*addresses, *shown)] == shown * 2
    assert lacks_secrets("https://host/two.safetensors?key=REDACTED-9")
    later = "https://REDACTED-9@host/two"  # as another process has written it
    assert without_secrets(later) == later


@pytest.mark.parametrize("text", ["['https://host/a','me@host']", "{'https://host':'me@host'}"])
def test_quotes_end_an_address(text: str) -> None:
    assert without_secrets(text) == text


def test_an_address_from_a_file_lacks_its_secrets() -> None:
    assert lacks_secrets("https://host/only-in-a-manifest?sig=REDACTED")


def test_parts_of_addresses() -> None:
    assert inside("s3://bucket/model/", "a/b.json") == "s3://bucket/model/a/b.json"
    assert inside("https://host/m?v=1", "a/b c.json") == "https://host/m/a/b%20c.json?v=1"
    assert file_name("s3://bucket/what?is=this") == "what?is=this"
    assert is_address("gs://b/m") and is_address("AZ://b/m")
    assert not any(map(is_address, ("ftp://b/m", "C://b/m", "s3://", "s3:/b/m")))


def test_an_object_has_one_name_whatever_its_signature() -> None:
    """So that a merge whose signatures were renewed goes on, in the same process, too."""
    at = "https://bucket.s3.amazonaws.com/renewed?partNumber=1&X-Amz-Date={0}&X-Amz-Expires=9"
    at += "&X-Amz-Credential=me%2F{0}&X-Amz-Signature={0}"
    blob = "https://account.blob.core.windows.net/c/renewed?sv=2024&st={0}&se={0}&sp=r&sig={0}"
    for form in (at, blob):
        shown = [without_secrets(form.format(f"{SECRET}{number}")) for number in range(3)]
        assert len(set(shown)) == 1 and SECRET not in shown[0]
        assert with_secrets(shown[0]) == form.format(f"{SECRET}2")
    other = at.replace("partNumber=1", "partNumber=2")
    assert without_secrets(other.format(SECRET)) != without_secrets(at.format(SECRET))
    signed = ("https://host/renewed?key=a&sig={}", "https://host/renewed?key=b&sig={}")
    assert len({without_secrets(each.format(SECRET)) for each in signed}) == 2


def test_an_adapter_by_address_has_secrets_of_its_own() -> None:
    both = f"https://host/base?sig={SECRET}1+https://host/adapter?sig={SECRET}2"
    base, _, adapter = without_secrets(both).partition("+")
    assert with_secrets(base) == f"https://host/base?sig={SECRET}1"
    assert with_secrets(adapter) == f"https://host/adapter?sig={SECRET}2"
