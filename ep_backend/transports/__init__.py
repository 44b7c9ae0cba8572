"""How bytes move, one file each. Here is what can be said about them without loading torch."""

OLDEST_CUDA = (13,)  # that a driver must serve for transport peer, whose kernels are one CUDA 13 binary
