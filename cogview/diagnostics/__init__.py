"""Checks of this machine and of a recipe on it, for ``cogview doctor``."""
