"""The families, by name."""

from evals.evidence.encoder import Encoder
from evals.evidence.language import Language
from evals.evidence.training import Family
from evals.evidence.vision import Vision

FAMILIES: dict[str, Family] = {family.name: family for family in (Language(), Vision(), Encoder())}
