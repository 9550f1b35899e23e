"""Headers that name a key twice are refused, however they are written."""

from __future__ import annotations

import json

import pytest

from outliermerge.checkpoint.formats import safetensors_file as file_of_tensors

TEXTS = [
    r'{"a":{"x":1,"x":2}}',
    r'{"a":1,"a":2}',
    r'{"a" :1,"a":2}',
    '{"a"\t:1,"a":2}',
    '{"a":{"x"\n:1,"x":2}}',
    r'{"__metadata__":{"f":"a","f":"b"}}',
    r'{"a\\":{"x":1},"a\\":{"x":1}}',
    r'{"a\":":1,"b":2,"b":3}',
    r'{"a":[{"k":1,"k":2}]}',
    r'{"a":{"b":{"c":1,"c":2}}}',
    r'{"x":"\":","y":1,"y":2}',
    r'{"k\\":1,"k\\":2,"z":"\":"}',
]
PLAIN = [
    r'{"__metadata__":{"f":"{\"a\": 1, \"a\": 2}"},"t":{"dtype":"F32"}}',
    r'{"t" : {"dtype" : "F32"}}',
    r'{"a\\":{"x":"\\"}}',
    r"[1]",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_that_stands_twice_is_found(text):
    with pytest.raises(file_of_tensors._DuplicateKeyError):
        file_of_tensors._decoded(text.encode())


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_are_decoded(text):
    assert file_of_tensors._decoded(text.encode()) == json.loads(text)
