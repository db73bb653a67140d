"""Questions with answers: one folder each, run by `slipstream bench NAME`."""
