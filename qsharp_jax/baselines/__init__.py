"""Training that is not Q#: what it starts from, and what it is compared with."""
