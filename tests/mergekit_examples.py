"""Equivalents of the merge files in mergekit 0.1.5's repository and documents, written anew.

The models are replicas: `base`, `m0`, `m1` and `m2` have six layers where those of the examples
have forty. Each file is named after where its example is. `docs/merge_methods.md` describes
parameters without files: here is one file for each method and each use that it names.
"""

from __future__ import annotations

_OF_BASE = "base_model: base\nmodels:\n"
_THREE = _OF_BASE + "  - model: m0\n  - model: m1\n  - model: m2\n"
_WEIGHED = (
    _OF_BASE
    + "  - {model: m0, parameters: {weight: 0.6}}\n"
    + "  - {model: m1, parameters: {weight: 0.4}}\n"
)
_KEPT = (
    _OF_BASE
    + "  - {model: m0, parameters: {weight: 0.6, density: 0.5}}\n"
    + "  - {model: m1, parameters: {weight: 0.4, density: 0.7}}\n"
)

FILES = {
    "examples/arcee_fusion.yml": """
models:
  - model: m0
  - model: m1
merge_method: arcee_fusion
base_model: m0
dtype: bfloat16
""",
    "examples/bio-merge.yml": """
merge_method: ties
base_model: base
models:
  - model: m0
    parameters: {weight: 0.4, density: 0.6}
  - model: m1
    parameters: {weight: 0.4, density: 0.6}
parameters:
  int8_mask: true
  normalize: false
dtype: float16
""",
    "examples/gradient-slerp.yml": """
slices:
  - sources:
      - {model: m0, layer_range: [0, 6]}
      - {model: m1, layer_range: [0, 6]}
merge_method: slerp
base_model: m0
parameters:
  t:
    - {filter: self_attn, value: [0.1, 0.4, 0.2, 0.8, 1]}
    - {filter: mlp, value: [0.9, 0.6, 0.8, 0.2, 0]}
    - value: 0.5 # all others
dtype: float16
""",
    "examples/gradient-slerp.yml, whole models": """
models:
  - model: m0
  - model: m1
merge_method: slerp
base_model: m0
parameters:
  t:
    - {filter: self_attn, value: [0.1, 0.4, 0.2, 0.8, 1]}
    - {filter: mlp, value: [0.9, 0.6, 0.8, 0.2, 0]}
    - value: 0.5
dtype: float16
""",
    "examples/linear.yml": """
models:
  - model: m0
    parameters:
      weight: 1
  - model: m1
    parameters:
      weight: 0.4
  - model: m2
    parameters:
      weight: 0.2
merge_method: linear
dtype: float16
""",
    "examples/orcamini-platy-44layer.yml": """
slices:
  - sources:
    - model: m0
      layer_range: [0, 4]
  - sources:
    - model: m1
      layer_range: [3, 6]
merge_method: passthrough
dtype: float16
""",
    "examples/ties.yml": """
models:
  - model: m0
    parameters:
      density: [1, 0.6, 0.2] # by layer
      weight: 0.9
  - model: m1
    parameters:
      density: 0.4
      weight: [0, 0.2, 0.6, 1]
  - model: m2
    parameters:
      density: 0.3
      weight:
        - filter: mlp
          value: 0.7
        - value: 0
merge_method: ties
base_model: base
parameters:
  int8_mask: true
  normalize: true
dtype: float16
""",
    "docs/merge_methods.md: linear": """
merge_method: linear
models:
  - {model: m0, parameters: {weight: 0.8}}
  - {model: m1, parameters: {weight: 0.6}}
parameters: {normalize: false}
""",
    "docs/merge_methods.md: slerp": """
merge_method: slerp
base_model: m0
models:
  - model: m1
parameters: {t: 0.3}
""",
    "docs/merge_methods.md: nuslerp, in the place of slerp": """
merge_method: nuslerp
models:
  - {model: m0, parameters: {weight: 0.7}}
  - {model: m1, parameters: {weight: 0.3}}
""",
    "docs/merge_methods.md: nuslerp, of task vectors": "merge_method: nuslerp\n" + _WEIGHED,
    "docs/merge_methods.md: nuslerp, of rows of the last dimension": (
        "merge_method: nuslerp\n" + _WEIGHED + "parameters: {nuslerp_flatten: false}\n"
    ),
    "docs/merge_methods.md: nuslerp, of rows of the first dimension": (
        "merge_method: nuslerp\n"
        + _WEIGHED
        + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n"
    ),
    "docs/merge_methods.md: multislerp": """
merge_method: multislerp
models:
  - {model: m0, parameters: {weight: 0.5}}
  - {model: m1, parameters: {weight: 0.3}}
  - {model: m2, parameters: {weight: 0.4}}
parameters: {normalize_weights: true, eps: 1e-8}
""",
    "docs/merge_methods.md: multislerp, of task vectors": (
        "merge_method: multislerp\n" + _WEIGHED + "parameters: {normalize_weights: false}\n"
    ),
    "docs/merge_methods.md: karcher": """
merge_method: karcher
models: [{model: m0}, {model: m1}, {model: m2}]
parameters: {max_iter: 10, tol: 1e-5}
""",
    "docs/merge_methods.md: task_arithmetic": (
        "merge_method: task_arithmetic\n" + _WEIGHED + "parameters: {lambda: 0.9}\n"
    ),
    "docs/merge_methods.md: task_arithmetic, of one model": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: m0, parameters: {weight: 0.5}}
""",
    "docs/merge_methods.md: ties": "merge_method: ties\n" + _KEPT + "parameters: {lambda: 1.1}\n",
    "docs/merge_methods.md: dare_linear": (
        "merge_method: dare_linear\n" + _KEPT + "parameters: {rescale: true, lambda: 0.9}\n"
    ),
    "docs/merge_methods.md: dare_ties": "merge_method: dare_ties\n" + _KEPT,
    "docs/merge_methods.md: della": (
        "merge_method: della\n" + _KEPT + "parameters: {epsilon: 0.1, lambda: 0.9}\n"
    ),
    "docs/merge_methods.md: della_linear": (
        "merge_method: della_linear\n" + _KEPT + "parameters: {epsilon: 0.2}\n"
    ),
    "docs/merge_methods.md: breadcrumbs": (
        "merge_method: breadcrumbs\n" + _WEIGHED + "parameters: {density: 0.9, gamma: 0.01}\n"
    ),
    "docs/merge_methods.md: breadcrumbs, of a large gamma": (
        "merge_method: breadcrumbs\n" + _WEIGHED + "parameters: {density: 0.9, gamma: 0.2}\n"
    ),
    "docs/merge_methods.md: breadcrumbs_ties": (
        "merge_method: breadcrumbs_ties\n" + _KEPT + "parameters: {gamma: 0.02}\n"
    ),
    "docs/merge_methods.md: sce": "merge_method: sce\n"
    + _THREE
    + "parameters: {select_topk: 0.4}\n",
    "docs/merge_methods.md: ram": "merge_method: ram\n" + _THREE + "parameters: {epsilon: 0.01}\n",
    "docs/merge_methods.md: ramplus_tl": (
        "merge_method: ramplus_tl\n" + _THREE + "parameters: {epsilon: 0.01, r: 0.2, alpha: 0.3}\n"
    ),
    "docs/merge_methods.md: model_stock": "merge_method: model_stock\n" + _THREE,
    "docs/merge_methods.md: model_stock, of rows": (
        "merge_method: model_stock\n" + _THREE + "parameters: {filter_wise: true}\n"
    ),
    "docs/merge_methods.md: nearswap": """
merge_method: nearswap
base_model: m0
models: [{model: m1}]
parameters: {t: 0.005}
""",
    "docs/merge_methods.md: arcee_fusion": """
merge_method: arcee_fusion
base_model: base
models: [{model: m0}]
""",
    "docs/merge_methods.md: passthrough": """
merge_method: passthrough
models:
  - model: m0
    parameters:
      scale:
        - {filter: down_proj, value: 0.6}
        - value: 1
""",
    "docs/multimerge.md": """
name: average
merge_method: linear
models: [{model: m0}, {model: m1}]
parameters: {weight: 0.5}
---
name: turned
merge_method: slerp
base_model: average
models: [{model: m2}]
parameters: {t: 0.4}
---
merge_method: dare_ties
base_model: base
models:
  - {model: turned, parameters: {density: 0.6, weight: 0.5}}
  - {model: m1, parameters: {density: 0.7, weight: 0.6}}
""",
    "docs/multimerge.md, all named": """
name: sum
merge_method: task_arithmetic
base_model: base
models: [{model: m0}, {model: m1}]
parameters: {weight: 0.5}
---
name: turned
merge_method: slerp
base_model: sum
models: [{model: m2}]
parameters: {t: 0.4}
---
name: average
merge_method: linear
models: [{model: turned}, {model: sum}]
parameters: {weight: 0.5}
""",
    "docs/create_a_merge_method.md": """
merge_method: test_mergekit_examples:weighted_average
models:
  - {model: m0, parameters: {weight: 0.3}}
  - {model: m1, parameters: {weight: 0.7}}
parameters: {normalize: true}
""",
}
"""By name: the text of a file."""

OF_RAW_FILES = """
merge_method: ties
base_model: base/model.safetensors
models:
  - {model: m0/model.safetensors, parameters: {weight: 0.6, density: 0.5}}
  - {model: m1/model.safetensors, parameters: {weight: 0.4, density: 0.5}}
"""
"""Of mergekit-pytorch, which the README names: models are single files."""

MIXTURES = {
    "docs/moe.md: syntax": """
base_model: base
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: one
    positive_prompts: [python code loop]
    negative_prompts: [story]
  - source_model: two
    positive_prompts: [math sum]
""",
    "docs/moe.md: a shared expert": """
base_model: base
gate_mode: hidden
architecture: qwen
dtype: bfloat16
experts:
  - source_model: one
    positive_prompts: [python code loop]
  - source_model: two
    positive_prompts: [math sum]
shared_experts:
  - source_model: two
    positive_prompts: [chat hello]
    residual_scale: 0.2
""",
    "docs/moe.md: cheap_embed": """
base_model: base
gate_mode: cheap_embed
experts_per_token: 1
dtype: float16
experts:
  - source_model: one
    positive_prompts: [python code loop]
  - source_model: two
    positive_prompts: [math sum]
""",
    "docs/moe.md: sparse upcycling": (
        "base_model: base\ngate_mode: random\ndtype: bfloat16\nexperts:\n"
        + 8 * "  - source_model: base\n"
    ),
    "docs/moe.md: four experts": """
base_model: base
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: base
    positive_prompts: ["hello chat", "chat"]
  - source_model: one
    positive_prompts: ["python code"]
  - source_model: two
    positive_prompts: ["story poem", "> poem", "[story]"]
  - source_model: one
    positive_prompts: ["sum prime", "math"]
""",
}
