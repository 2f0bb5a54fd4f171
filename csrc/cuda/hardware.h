// What kernels ask of the hardware, as functions: with nvcc the instructions themselves, with another compiler the same
// on a CPU by testing/simt.h, which checks every access. Kernels use nothing else, so that one source builds with both.
//
// Shared memory is addressed by numbers, from shared() on. All threads of a warp call together what has "warp" in its
// comment.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define KEEP_LOOP _Pragma("unroll 1")

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dynexec::hardware {

struct Float16 {};
struct BFloat16 {};

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

DEVICE int thread() { return threadIdx.x; }
DEVICE int block() { return blockIdx.x; }
DEVICE uint32_t shared() { return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)); }

DEVICE uint32_t load32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

DEVICE uint2 load64(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address));
  return value;
}

DEVICE void store32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

DEVICE void store128(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// The value, of which the compiler knows nothing.
DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

template <class T>
DEVICE T read(const T* from) {
  return *from;
}

template <class T>
DEVICE void write(T* to, T value) {
  *to = value;
}

DEVICE int fetch_add(int* to, int value) { return atomicAdd(to, value); }

// Start a copy of 16 bytes from global to shared memory; commit() ends a group of them, wait<N>() waits until at most the
// last N groups are under way. Other threads see what was copied behind a barrier.
DEVICE void copy128(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE void barrier() { __syncthreads(); }

// Blocks of a cluster: their number within it, a barrier for all of them, and their memory.
#if __CUDA_ARCH__ >= 900
DEVICE int rank() {
  int value;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return value;
}

DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DEVICE void store32_remote(int to, uint32_t address, uint32_t value) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(to));
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
}
#else
DEVICE int rank() { return 0; }
DEVICE void cluster_barrier() { __syncthreads(); }
DEVICE void store32_remote(int, uint32_t address, uint32_t value) { store32(address, value); }
#endif

// Warp: four 8x8 matrices of 16-bit values; lane i has the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(uint32_t (&values)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(address)
               : "memory");
}

// Warp: d += a b, a 16x16, b 16x8, d in float.
template <class Half>
DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint2 b);

template <>
DEVICE void multiply_add<Float16>(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

template <>
DEVICE void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// Warp.
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Two floats as 16-bit values in one word, rounded to even, the first one in the lower half; and back.
template <class Half>
DEVICE uint32_t pack(float low, float high);

template <>
DEVICE uint32_t pack<Float16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <>
DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <class Half>
DEVICE float2 unpack(uint32_t both);

template <>
DEVICE float2 unpack<Float16>(uint32_t both) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

template <>
DEVICE float2 unpack<BFloat16>(uint32_t both) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}

}  // namespace dynexec::hardware

#else
#include "../testing/simt.h"
#endif
