"""Read images of users, and write PNG files with metadata."""
