"""Other libraries' files: one module a format."""
