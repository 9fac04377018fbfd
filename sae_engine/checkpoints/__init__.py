"""Checkpoints of this library and of others: one module a format, and which is which in :mod:`.formats`."""
