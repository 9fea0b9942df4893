"""The benchmark: the engine as a share of what its HTTP stack can do, beside its peers, overloaded.

- ``figures``, ``cases``: kinds of requests to the engine, and what each costs (a new one goes here)
- ``compare``, ``peers``: the engine beside other services (a new peer goes into ``peers``)
- ``durable``: orders in PostgreSQL a second, for long
- ``overload``, ``half``, ``idle``: open loops against the same rig
- ``rig``, ``offer``, ``open_loop``: the engine in parts, and how load is offered to it
"""
