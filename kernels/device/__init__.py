"""Triton: device code and the launchers beneath the contracts, one file a stem. Files with an underscore are shared."""
