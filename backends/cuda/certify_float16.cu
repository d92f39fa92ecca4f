// Exact top-k of keys kept as float16: a file of its own, for a compiler takes seconds over each.

#include "certify.cuh"

CERTIFY(Half, float16)
