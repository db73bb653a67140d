"""How long new weights take to reach the workers."""
