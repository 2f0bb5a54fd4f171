// AVX2 with fused multiply-add; CMakeLists.txt gives the flags.
#if defined(__x86_64__)
#define DYNEXEC_TABLE kAvx2Kernels
#define DYNEXEC_WIDTH 8
#define DYNEXEC_REGISTERS 16
#include "kernels_impl.h"
#endif
