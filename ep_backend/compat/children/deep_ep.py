"""What ``import deep_ep`` finds in processes that are started through multiprocessing by one where ep_backend
stands in for it: of their parent they have ``sys.path``, with this folder at its end, and nothing else. An
engine may ask for the module there before it calls its plug-ins."""

from ep_backend import compat

compat.provide_deep_ep()
