"""Checkpoints of crosscoders and cross-layer transcoders: a file for each format, :mod:`.formats` chooses."""
