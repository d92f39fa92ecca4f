// Exact top-k of keys kept as bfloat16: a file of its own, for a compiler takes seconds over each.

#include "certify.cuh"

CERTIFY(Brain, bfloat16)
