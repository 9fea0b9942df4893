"""Load tests, on one generator, one set of tables and one check of every answer.

- ``rush``: an open loop against a running engine, with proof; ``rehearsal``: what `sale rehearse`
  plays of it; ``demo``: a whole engine and a scripted rush, from nothing
- ``crowd``: a release with people in it, by Locust (``locustfile.py``)
- ``bench``: the engine as a share of what its HTTP stack can do, beside its ``peers``, overloaded
- ``generator``: sends requests, in an open loop or with a window; ``summary`` counts what came of
  it into a ``record``, judged by ``thresholds``; ``tables`` and ``report`` show it
- ``books``: every answer that clients got, against PostgreSQL
- ``engine``, ``sampler``, ``surroundings``: the engine as a child, watched, described
- ``wire``, ``client``, ``members``: HTTP bytes, single requests, cards; ``scenarios``: rushes
"""
