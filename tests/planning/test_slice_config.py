"""What the config of an output of slices says of its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outliermerge.checkpoint.sources import Checkpoint
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.plan import Input, LayersFrom, Stacked
from outliermerge.planning.slice_config import stacked_config

FOUR = {"num_hidden_layers": 4}
TWICE = [(0, 0, 2), (0, 0, 4)]  # layers 0, 1, 0, 1, 2, 3
SHIFTED = [(0, 1, 4)]  # layers 1, 2, 3
TWO_MODELS = [(0, 0, 1), (1, 2, 4)]


def stacked(
    ranges: list[tuple[int, int, int]], depths: tuple[int, ...], kind: str = "text"
) -> Stacked:
    slices, at = [], 0
    for number, start, stop in ranges:
        end = at + stop - start
        slices.append(LayersFrom(at, end, number, (number,), {number: (start, stop)}))
        at = end
    return Stacked(kind, kind, "layers.", tuple(slices), depths)


def fitted(
    configs: list[dict[str, Any]],
    ranges: list[tuple[int, int, int]],
    folder: Path,
    *,
    kind: str = "text",
    depth: int = 4,
) -> dict[str, Any]:
    inputs = []
    for number, config in enumerate(configs):
        home = folder / str(number)
        home.mkdir()
        (home / "config.json").write_text(json.dumps(config))
        checkpoint = Checkpoint(home, {}, (), (), ())
        inputs.append(Input(str(number), "model", checkpoint, home))
    depths = (depth,) * len(configs)
    return stacked_config(
        json.loads(json.dumps(configs[0])), stacked(ranges, depths, kind), inputs, 0
    )


F, S = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "ranges", "changed"),
    [
        (FOUR, TWICE, {"num_hidden_layers": 6}),
        ({"n_layer": 4, "n_head": 4}, TWICE, {"n_layer": 6, "n_head": 4}),
        (FOUR | {"layer_types": [F, S, S, F]}, TWICE, {"layer_types": [F, S, F, S, S, F]}),
        (FOUR | {"layer_types": [F, S, S, F]}, SHIFTED, {"layer_types": [S, S, F]}),
        (FOUR | {"num_key_value_heads": [1, 2, 3, 4]}, SHIFTED, {"num_key_value_heads": [2, 3, 4]}),
        (FOUR | {"eos_token_id": [5, 6, 7, 8]}, SHIFTED, {"eos_token_id": [5, 6, 7, 8]}),
        (FOUR | {"layer_types": [F, S]}, SHIFTED, {"layer_types": [F, S]}),  # not of its layers
        (FOUR | {"cross_attention_layers": [1, 3]}, TWICE, {"cross_attention_layers": [1, 3, 5]}),
        (FOUR | {"max_window_layers": 4}, TWICE, {"max_window_layers": 6}),
        (
            FOUR | {"max_window_layers": 2, "use_sliding_window": True},
            [(0, 0, 2), (0, 1, 4)],
            {"max_window_layers": 3},
        ),
        (
            FOUR | {"max_window_layers": 2, "use_sliding_window": True},
            [(0, 1, 3), (0, 0, 2)],
            {"max_window_layers": 2, "layer_types": [F, S, F, F]},
        ),
        (
            FOUR | {"decoder_sparse_step": 1, "mlp_only_layers": [1]},
            TWICE,
            {"decoder_sparse_step": 1, "mlp_only_layers": [1, 3]},
        ),
        (
            FOUR | {"decoder_sparse_step": 2, "mlp_only_layers": []},
            TWICE,
            {"decoder_sparse_step": 2, "mlp_only_layers": []},
        ),
        (
            FOUR | {"decoder_sparse_step": 2, "mlp_only_layers": []},
            SHIFTED,
            {"decoder_sparse_step": 1, "mlp_only_layers": [1]},
        ),
        (FOUR | {"first_k_dense_replace": 1}, SHIFTED, {"first_k_dense_replace": 0}),
        (
            FOUR | {"first_k_dense_replace": 2},
            [(0, 0, 2), (0, 0, 4)],
            {"first_k_dense_replace": 4},
        ),
        (
            FOUR | {"first_k_dense_replace": 1, "moe_layer_freq": 2},
            [(0, 0, 4), (0, 2, 4)],
            {"first_k_dense_replace": 1},
        ),
        (FOUR | {"num_nextn_predict_layers": 1}, SHIFTED, {"num_nextn_predict_layers": 0}),
        (
            FOUR | {"attn_layer_period": 2, "attn_layer_offset": 1},
            [(0, 0, 4), (0, 2, 4)],
            {"attn_layer_period": 2},
        ),
        (FOUR | {"sliding_window_pattern": 2, "layer_types": [S, F, S, F]}, SHIFTED,
         {"layer_types": [F, S, F]}),
        ({"text_config": FOUR, "vision_config": FOUR}, TWICE,
         {"text_config": {"num_hidden_layers": 6}, "vision_config": FOUR}),
        (FOUR | {"text_config": FOUR}, TWICE,
         {"num_hidden_layers": 6, "text_config": {"num_hidden_layers": 6}}),
    ],
)  # fmt: skip
def test_counts_and_lists_of_layers_are_cut_and_stacked(config, ranges, changed, tmp_path):
    found = fitted([config], ranges, tmp_path)
    counts = {"num_hidden_layers": sum(stop - start for _, start, stop in ranges)}
    assert found == config | (counts if "num_hidden_layers" in config else {}) | changed


@pytest.mark.parametrize(
    ("config", "kind", "changed"),
    [
        ({"num_layers": 4, "num_decoder_layers": 2}, "encoder", {"num_layers": 6}),
        ({"num_layers": 4}, "encoder", {"num_layers": 6, "num_decoder_layers": 4}),
        ({"num_layers": 2, "num_decoder_layers": 4}, "decoder", {"num_decoder_layers": 6}),
        ({"num_layers": 4}, "decoder", {"num_decoder_layers": 6}),
        (
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            "encoder",
            {"encoder_layers": 6, "num_hidden_layers": 6},
        ),
        (
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            "decoder",
            {"decoder_layers": 6},
        ),
        (
            {"vision_config": {"depth": 4, "fullatt_block_indexes": [1, 3]}, **FOUR},
            "vision",
            {"vision_config": {"depth": 6, "fullatt_block_indexes": [1, 3, 5]}},
        ),
        ({"vision_config": FOUR, "text_config": FOUR}, "vision",
         {"vision_config": {"num_hidden_layers": 6}}),
        ({"thinker_config": {"audio_config": FOUR, "text_config": FOUR}}, "audio",
         {"thinker_config": {"audio_config": {"num_hidden_layers": 6}, "text_config": FOUR}}),
    ],
)  # fmt: skip
def test_each_kind_of_stack_has_its_own_count(config, kind, changed, tmp_path):
    assert fitted([config], TWICE, tmp_path, kind=kind) == config | changed


def test_lists_are_of_the_model_that_a_layer_is_from(tmp_path):
    configs = [FOUR | {"layer_types": ["a", "b", "c", "d"]}, FOUR | {"layer_types": [*"efgh"]}]
    assert fitted(configs, TWO_MODELS, tmp_path)["layer_types"] == ["a", "g", "h"]


def test_types_of_layers_that_only_the_class_knows_are_written(tmp_path):
    gemma = FOUR | {
        "model_type": "gemma2",
        "sliding_window": 8,
        "architectures": ["Gemma2ForCausalLM"],
    }
    other = fitted([gemma], SHIFTED, tmp_path)
    assert other["layer_types"] == [F, S, F]


def test_types_of_layers_that_stay_as_the_class_has_them_are_not_written(tmp_path):
    gemma = FOUR | {"model_type": "gemma2", "sliding_window": 8}
    assert fitted([gemma], TWICE, tmp_path) == gemma | {"num_hidden_layers": 6}


def test_a_count_that_the_config_leaves_to_its_class_is_written(tmp_path):
    found = fitted([{"model_type": "gpt2"}], [(0, 0, 3)], tmp_path, depth=12)
    assert found == {"model_type": "gpt2", "n_layer": 3}


@pytest.mark.parametrize(
    ("config", "ranges", "said"),
    [
        (
            FOUR | {"first_k_dense_replace": 1},
            TWICE,
            "first_k_dense_replace 1 says that only the first layers have no experts",
        ),
        (
            FOUR | {"attn_layer_period": 2, "attn_layer_offset": 1},
            SHIFTED,
            "attn_layer_period 2 tells the kinds of layers by their numbers. Layer 0 of the output "
            "would be of another kind than layer 1, which it is from: take ranges that begin and "
            "end at multiples of 2",
        ),
        (FOUR | {"sliding_window_pattern": 2}, SHIFTED, "sliding_window_pattern 2 tells the kinds"),
    ],
)
def test_what_a_config_cannot_say_is_refused(config, ranges, said, tmp_path):
    with pytest.raises(OutlierMergeError) as caught:
        fitted([config], ranges, tmp_path)
    assert said in str(caught.value)


def test_a_model_without_a_config_stays_without(tmp_path):
    assert fitted([{}], TWICE, tmp_path) == {}
