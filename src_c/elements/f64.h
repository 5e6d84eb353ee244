/* f64.h: float64 in memory and in the lanes. */
#define REAL_IS_FLOAT64
#include "simd.h"

typedef double elem;
typedef double real;
#define FEW_INSTANCES
#define REAL_MAX DBL_MAX

#include "elements/whole.h"
