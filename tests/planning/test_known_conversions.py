"""What is read of transformers' table is what transformers has, and torch is not imported."""

from __future__ import annotations

import subprocess
import sys

from transformers import conversion_mapping

from outliermerge.planning import known_conversions
from outliermerge.planning.known_conversions import known_of, table


def test_the_table_is_that_of_transformers():
    real = conversion_mapping._build_checkpoint_conversion_mapping()
    assert table().keys() == real.keys()
    for key, entries in real.items():
        ours = table()[key]
        assert [type(entry).__name__ for entry in entries] == [entry.kind for entry in ours], key
        for entry, own in zip(entries, ours, strict=True):
            if own.kind == "PrefixChange":
                continue
            assert entry._original_source_patterns == own.source_patterns
            assert entry._original_target_patterns == own.target_patterns
            if own.kind == "WeightConverter":
                steps = known_conversions._rule(key, own).steps
                assert [type(step).__name__ for step in entry.operations] == [s.name for s in steps]
                for step, kept in zip(entry.operations, steps, strict=True):
                    assert all(vars(step)[name] == value for name, value in kept.given.items())


def test_reading_it_imports_neither_transformers_nor_torch():
    code = (
        "import sys\n"
        "from outliermerge.planning.known_conversions import known_of\n"
        "known = known_of({'model_type': 'qwen3_moe'})\n"
        "assert len(known.rules) == 2\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_type_that_is_not_known_has_no_conversion():
    assert known_of({"model_type": "no such type"}) == known_of({})
    assert known_of({"model_type": ["x"], "architectures": "y"}) == known_of({})
