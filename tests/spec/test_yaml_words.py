"""What is not valid YAML is told in words: where, and what to do, without the parser's terms."""

from __future__ import annotations

import re

import pytest

from outliermerge.errors import SpecError
from outliermerge.spec.text import parse_yaml

COLUMN = "this line begins in another column than the entries that begin in line {}. "
NO_COLON = "there is no colon after the key. Write `key: value`."
NO_SPACE = "there is no space after the colon. Write `key: value`."
QUOTES = "Put a text that has it in quotes."
NO_TAGS = "tags are not read here."
CASES = {
    "tab before a key": ("a: 1\n\tb: 2\n", "2:1", "found a tab. Indent with spaces."),
    "tab before a dash": ("models:\n\t- model: a\n", "2:1", "found a tab. Indent with spaces."),
    "key too deep": (
        "merge_method: ties\n  base_model: x\n",
        "2:3",
        "this line is indented further than line 1, which has a value already.",
    ),
    "two colons": ("base_model: a: b\n", "1:14", "a second colon in one line."),
    "drive letter": ("output: C: \\x\n", "1:10", "a second colon in one line."),
    "no colon, first": ("merge_method ties\nbase_model: x\n", "1:1", NO_COLON),
    "no colon, last": ("base_model: x\nmerge_method ties\n", "2:1", NO_COLON),
    "no colon, comment between": ("merge_method ties\n# c\nb: x\n", "1:1", NO_COLON),
    "no colon, after a line break of Unicode": ("a: 1\u2028no colon\n", "2:1", NO_COLON),
    "equals sign": ("a = 1\nb: 2\n", "1:1", NO_COLON),
    "no space, first": ("merge_method:ties\nbase_model: x\n", "1:1", NO_SPACE),
    "no space, inside": ("models:\n  - model: a\n    x:\n      w:1\n      d: 2\n", "4:7", NO_SPACE),
    "key a column short": ("models:\n  - model: a\n   x: 1\n", "3:4", COLUMN.format(2)),
    "key between columns": ("parameters:\n    a: 1\n  b: 2\n", "3:3", COLUMN.format(1)),
    "key beside dashes": ("models:\n  - model: a\n  x: 1\n", "3:3", COLUMN.format(2)),
    "dash beside keys": ("a: 1\n- b\n", "2:1", "found a dash among the keys"),
    "dash in the key's line": ("models: - model: a\n", "1:9", "a list begins in the line of its"),
    "indented first key": (" a: ties\nmodels: 1\n", "2:1", "this line begins in another column"),
    "open [": ("d: [1, 2\nlambda: 1\n", "1:4", "the [ of line 1 is not closed. Write ]"),
    "open [ to the end": ("d: [1, 2\n", "1:4", "the [ of line 1 is not closed. Write ]"),
    "open {": ("a:\n  - {b: 1\n  - {c: 2}\n", "2:5", "the { of line 2 is not closed, or line 3"),
    "open { to the end": ("p: {t: 2\n", "1:4", "the { of line 1 is not closed. Write }"),
    "no comma": ("d: {a: 1 b: 2}\n", "1:11", "after the { of line 1, a comma or } is missing"),
    "no comma in JSON": ('{"a": 1\n "b": 2}\n', "1:1", "the { of line 1 is not closed, or line 2"),
    "two commas": ('{"a": 1,, "b": 2}\n', "1:9", "found ',' in place of a value."),
    "stray bracket": ("b: ]\n", "1:4", "found ']' in place of a value."),
    "open quote": ("base_model: 'x\nmodels: 1\n", "1:13", "the quote that opens here is never"),
    "open double quote": ('base_model: "x\n', "1:13", "the quote that opens here is never"),
    "text after a quote": ("base_model: 'x' y\n", "1:17", "something stands after a quoted text."),
    "escape in a pattern": ('from: "\\d+"\n', "1:9", "in double quotes, a backslash before 'd'"),
    "star": ("filter: *\n", "1:10", "a text cannot begin with *."),
    "star and a name": ("filter: *mlp\n", "1:9", "nothing is named 'mlp' with & before this."),
    "ampersand": ("a: &\n", "1:5", "a text cannot begin with &."),
    "at sign": ("model: @x\n", "1:8", "a text cannot begin with '@'. Put it in quotes."),
    "backtick": ("model: `x`\n", "1:8", "a text cannot begin with '`'. Put it in quotes."),
    "per cent": ("a: %x\n", "1:4", "a text cannot begin with '%'. Put it in quotes."),
    "per cent at the start": ("%x: 1\n", "1:3", "a line cannot begin with %."),
    "tag": ("a: !x 1\n", "1:4", NO_TAGS),
    "tag of a type": ("a: !!python/name:os.system 1\n", "1:4", NO_TAGS),
    "tag of a handle": ("a: !e!x 1\n", "1:4", NO_TAGS),
    "two documents": ("a: 1\n---\nb: 1\n", "2:1", "a second document begins here."),
    "bar": ("a: |x\n", "1:5", "found a text that begins with | or >."),
    "greater sign": ("a: > x\n", "1:6", "found a text that begins with | or >."),
    "anchor twice": ("a: &x 1\nb: &x 2\n", "2:4", "the name 'x' is given twice with &."),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_of_yaml_is_told_in_words_at_its_place(case):
    text, place, said = CASES[case]
    with pytest.raises(SpecError) as raised:
        parse_yaml(text, file="FILE")
    message = str(raised.value)
    assert message.startswith(f"FILE:{place}: not valid YAML: {said}")
    assert "\n" not in message
    terms = r"mapping values|block (end|mapping|collection)|flow|scalar|token|stream|node|while "
    assert not re.search(terms, message)
