// What every processor of this kind can do: SSE2 on x86-64, NEON on aarch64.
#define DYNEXEC_TABLE kGenericKernels
#define DYNEXEC_WIDTH 4
#if defined(__aarch64__)
#define DYNEXEC_REGISTERS 32
#else
#define DYNEXEC_REGISTERS 16
#endif
#include "kernels_impl.h"
