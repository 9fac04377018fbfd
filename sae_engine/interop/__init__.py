"""Other libraries' files: one module a format, and which is which in :mod:`.formats`."""
