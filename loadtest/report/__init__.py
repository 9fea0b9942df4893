"""A run's record as one HTML file, or two side by side."""
