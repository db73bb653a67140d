"""One job under faults of every kind; see run.py."""
