"""A small world that is real, licensed and checkable: scenes of emoji with exact Chinese captions."""
