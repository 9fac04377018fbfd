"""Every selection rule: a score, a scope and a criterion over the operations of ``functional``, in a module."""
from .._running import Running
from .aux_zipf import AuxZipfTopK
from .base import Activation, captured_size, kept_values
from .batch_topk import BatchTopK, MutualChoice
from .density import RunningDensity
from .feature_choice import FeatureChoice
from .gated import Gated
from .gradient import GradientTopK
from .matryoshka import MatryoshkaBatchTopK
from .over_sources import TopKOverSources
from .per_source import PerSource
from .sampled import SampledTopK
from .statistical import StatisticalTopK
from .threshold import JumpReLU, LogJumpReLU, ReLU
from .top_afa import TopAFA
from .topk import AbsTopK, AuxTopK, TopK

__all__ = [
    "AbsTopK",
    "Activation",
    "AuxTopK",
    "AuxZipfTopK",
    "BatchTopK",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "JumpReLU",
    "LogJumpReLU",
    "MatryoshkaBatchTopK",
    "MutualChoice",
    "PerSource",
    "ReLU",
    "Running",
    "RunningDensity",
    "SampledTopK",
    "StatisticalTopK",
    "TopAFA",
    "TopK",
    "TopKOverSources",
    "captured_size",
    "kept_values",
]
