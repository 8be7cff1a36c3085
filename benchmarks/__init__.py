"""How fast the project is, beside the same work done in PyTorch. Start with `make bench`, or see run.py."""
