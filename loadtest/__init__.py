"""Load tests: one client and one check of the books, used by demo, benchmark, Locust and tests."""
