#include "resident.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "resident_launch.h"

namespace dynexec {
namespace {

template <class Half, int BLOCKS, bool DECIDES>
__global__ void __launch_bounds__(resident::kThreads, 1) run_resident(const __grid_constant__ resident::Batch batch) {
#if __CUDA_ARCH__ >= 900
  resident::Kernel<Half, BLOCKS, DECIDES>(batch).run();
#else
  if constexpr (BLOCKS == 1) resident::Kernel<Half, BLOCKS, DECIDES>(batch).run();
#endif
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of somebody else reports it
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

resident::Network network(const ResidentPart& part) {
  return {reinterpret_cast<const unsigned char*>(part.weights),
          reinterpret_cast<const float*>(part.biases),
          reinterpret_cast<const resident::Conv*>(part.convs),
          reinterpret_cast<const float*>(part.head),
          reinterpret_cast<const float*>(part.head_biases),
          {part.ends[0], part.ends[1], part.ends[2]},
          part.outputs};
}

template <class Half, int BLOCKS, bool DECIDES>
void launch(cudaStream_t stream, int samples, const resident::Batch& batch) {
  const auto kernel = run_resident<Half, BLOCKS, DECIDES>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, resident::kSharedBytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = BLOCKS;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(samples * BLOCKS);
  config.blockDim = dim3(resident::kThreads);
  config.dynamicSmemBytes = resident::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = BLOCKS > 1;
  check(cudaLaunchKernelEx(&config, kernel, batch), "cudaLaunchKernelEx");
}

template <class Half, bool DECIDES>
void launch(cudaStream_t stream, const ResidentLaunch& how, const resident::Batch& batch) {
  switch (how.blocks) {
    case 1:
      return launch<Half, 1, DECIDES>(stream, how.samples, batch);
    case 2:
      return launch<Half, 2, DECIDES>(stream, how.samples, batch);
    case 4:
      return launch<Half, 4, DECIDES>(stream, how.samples, batch);
  }
  throw std::runtime_error("launch_resident: clusters are of 1, 2 or 4 blocks");
}

}  // namespace

void launch_resident(uint64_t stream_handle, const ResidentLaunch& how, const ResidentPart& part,
                     const ResidentPart* policy) {
  if (how.size < 4 || how.size > 32 || how.size % 4 || part.ends[2] > resident::kMaxColumns ||
      (policy && policy->ends[2] > resident::kMaxColumns)) {
    throw std::runtime_error("launch_resident: images of 4, 8, ... or 32 pixels, and at most 512 blocks");
  }
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const resident::Batch batch{reinterpret_cast<const uint16_t*>(how.images),
                              {how.strides[0], how.strides[1], how.strides[2], how.strides[3]},
                              how.size,
                              policy ? network(*policy) : resident::Network{},
                              network(part),
                              reinterpret_cast<const uint8_t*>(how.given),
                              reinterpret_cast<uint8_t*>(how.decided),
                              reinterpret_cast<float*>(how.results),
                              reinterpret_cast<const int*>(how.order)};
  using hardware::BFloat16;
  using hardware::Float16;
  if (how.samples == 0) return;
  if (policy) {
    how.bfloat16 ? launch<BFloat16, true>(stream, how, batch) : launch<Float16, true>(stream, how, batch);
  } else {
    how.bfloat16 ? launch<BFloat16, false>(stream, how, batch) : launch<Float16, false>(stream, how, batch);
  }
}

}  // namespace dynexec
