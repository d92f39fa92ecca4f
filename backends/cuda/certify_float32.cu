// Exact top-k of float32 keys: a file of its own, for a compiler takes seconds over each.

#include "certify.cuh"

CERTIFY(float, float32)
