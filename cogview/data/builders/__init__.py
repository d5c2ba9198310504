"""Builders of token stores from images and captions."""
