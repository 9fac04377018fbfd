"""What ships with the package: a small trained language model and fixed evaluation text (embedded_model/README.md)."""
