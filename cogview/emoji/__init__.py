"""The emoji world: an application of the toolkit whose images can be graded exactly."""
