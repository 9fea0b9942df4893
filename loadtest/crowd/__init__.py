"""A release with people in it, played with Locust: see ``loadtest/locustfile.py``."""
