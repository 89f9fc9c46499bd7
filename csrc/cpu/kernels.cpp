// The vectorised loops around csrc/math, compiled once per ISA: PYZERO_ISA names the namespace.
#include "kernels.h"

#ifndef PYZERO_ISA
#define PYZERO_ISA baseline
#endif
#define PZ_STRING_(x) #x
#define PZ_STRING(x) PZ_STRING_(x)

#include "adam.h"
#include "lion.h"
#include "reduce_scatter.h"
#include "sgd.h"
#include "unscale.h"

namespace pyzero {
namespace PYZERO_ISA {

extern const KernelTable kKernels;
const KernelTable kKernels{PZ_STRING(PYZERO_ISA), adam, lion, sgd, scale, stream_copy, reduce};

}  // namespace PYZERO_ISA
}  // namespace pyzero
