"""What the adapters of all engines share: refusals, the machine's settings, communicators, what travels.

Imports no engine. Adapters hold the rest: where an engine is touched, and what its options are called.
"""
