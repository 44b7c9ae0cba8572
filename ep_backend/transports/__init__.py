"""How bytes move, one file each. Here is what can be said about them without loading torch."""

TRANSPORTS = ("cpu", "peer", "host", "mixed", "collective", "hier")
OF_GPUS = frozenset({"peer", "mixed", "host"})  # those made of our CUDA kernels
OLDEST_CUDA = (13,)  # that a driver must serve for them, as they are one CUDA 13 binary
