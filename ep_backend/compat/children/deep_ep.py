"""What ``import deep_ep`` finds in processes that a program of ``python -m ep_backend.compat`` starts through
multiprocessing: of their parent they have ``sys.path``, with this folder at its end, and nothing else."""

from ep_backend import compat

compat.provide_deep_ep()
