"""Load tests: each kind is a package, and all of them use one client and one check of the books.

- ``rush``: an open loop against a running engine, with proof
- ``crowd``: a release with people in it, by Locust (``locustfile.py``)
- ``bench``: the engine as a share of what its HTTP stack can do, and beside its ``peers``
- ``demo``: a whole engine and a whole release, from nothing
- ``report``: a run's ``record`` as one HTML file, or two side by side
- ``books``: every answer that clients got, against PostgreSQL
"""
