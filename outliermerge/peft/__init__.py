"""Algorithm 1 of arXiv 2501.10661 as kinds of adapters of Hugging Face peft.

    W' = (1 + s) · W + B·A     ScaledLoraConfig
    W' = W + s · N             NoiseConfig, N standard Gaussian noise that is made from a seed

peft takes both as configs: `peft.get_peft_model(model, ScaledLoraConfig(r=8))`. Importing this
package registers the two kinds in peft's tables: peft has no other way to make `get_peft_model` and
`PeftModel.from_pretrained` accept them. So import it before an adapter is loaded. `outliermerge
run` takes saved adapters as task models, without peft.
"""

from __future__ import annotations

from outliermerge.errors import OutlierMergeError

try:
    import peft as _peft  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise OutlierMergeError(
        f"outliermerge.peft needs {error.name}, which is not installed: pip install {error.name}"
    ) from error

from outliermerge.peft.config import NoiseConfig, ScaledLoraConfig
from outliermerge.peft.initial import gp_pareto
from outliermerge.peft.model import NoiseModel, ScaledLoraModel, register

__all__ = ["NoiseConfig", "NoiseModel", "ScaledLoraConfig", "ScaledLoraModel", "gp_pareto"]

register()
