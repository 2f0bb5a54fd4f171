// AVX-512; CMakeLists.txt gives the flags.
#if defined(__x86_64__)
#define DYNEXEC_TABLE kAvx512Kernels
#define DYNEXEC_WIDTH 16
#define DYNEXEC_REGISTERS 32
#include "kernels_impl.h"
#endif
