"""``CogView``: a model of one checkpoint folder, or of a bundle, and its public API."""
