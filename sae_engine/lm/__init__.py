"""Activation sparsity inside language models: weights that are multiplied by zeros, or by almost nothing, are not read.

:func:`sparsify` has a rule decide what is kept, and changes the function; :func:`sae_engine.accelerate` of a language
model skips the zeros that the model itself makes, and changes nothing; :func:`sae_engine.restore` undoes either.
"""
from .reporting import LayerReport, Report, report
from .switching import sparsify
from .truncation import ppl_sparsity
from .weighed import Threshold, TopShare, load

__all__ = ["LayerReport", "Report", "Threshold", "TopShare", "load", "ppl_sparsity", "report", "sparsify"]
