"""A whole engine and a whole release, from nothing."""
