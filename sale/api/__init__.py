"""HTTP: the API and its pages."""
