// Exact top-k of keys kept as int8, with a scale each: a file of its own, for a compiler takes seconds over each.

#include "certify.cuh"

CERTIFY(Code, int8)
