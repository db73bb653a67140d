"""Error and speed of every kernel on the device at hand."""
