/* f32.h: float32 in memory and in the lanes. */
#include "simd.h"

typedef float elem; /* what lies in memory */
typedef float real; /* what a lane computes in; coefficients and partial sums */
#define REAL_MAX FLT_MAX

#include "elements/whole.h"
