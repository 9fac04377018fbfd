"""Every operation in fast stock PyTorch: what a CPU runs, one file a stem. Meaning and signatures: ``reference.py``."""
