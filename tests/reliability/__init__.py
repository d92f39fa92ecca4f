"""What the promises of durability, isolation and refusal are held against; `python -m reliability --help` from tests/.

Every check is a function of a count and a seed that raises where a promise is broken, runs in a process of its own, and
prints what it did. The fast counts are part of the tests; `nox -s reliability` runs the long ones.
"""
