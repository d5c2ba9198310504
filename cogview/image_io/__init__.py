"""Images read from users, PNG files written for them."""
