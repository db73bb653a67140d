"""How much of a decode step is spent outside the model."""
