"""Training data: the token store, its sampling order, and the emoji scenes."""
