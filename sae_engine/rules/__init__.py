"""Selection rules beyond the common ones: each a score, a scope and a criterion over the operations of `functional`."""
from .aux_zipf import AuxZipfTopK
from .calibrate import calibrate_threshold
from .density import RunningDensity
from .feature_choice import FeatureChoice
from .gated import Gated
from .gradient import GradientTopK
from .inference import inference_form
from .initial import init_as_top_afa, init_sparse
from .jumprelu import LogJumpReLU
from .matryoshka import MatryoshkaBatchTopK
from .sampled import SampledTopK
from .statistical import StatisticalTopK

__all__ = [
    "AuxZipfTopK",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "LogJumpReLU",
    "MatryoshkaBatchTopK",
    "RunningDensity",
    "SampledTopK",
    "StatisticalTopK",
    "calibrate_threshold",
    "inference_form",
    "init_as_top_afa",
    "init_sparse",
]
