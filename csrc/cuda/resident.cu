// Instances of the kernel in resident.h, and their launches.
#include "resident.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "check.h"
#include "resident_launch.h"

namespace dynexec {
namespace {

template <class Half, int BLOCKS, bool DECIDES>
__global__ void __launch_bounds__(resident::kThreads, 1) run_resident(const __grid_constant__ resident::Batch batch) {
#if __CUDA_ARCH__ >= 900
  resident::Kernel<Half, BLOCKS, DECIDES>(batch).run();
#else
  if constexpr (BLOCKS == 1) {
    resident::Kernel<Half, BLOCKS, DECIDES>(batch).run();
  } else {
    __trap();  // compiled for a GPU without clusters
  }
#endif
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

// How a kernel is launched; valid as long as it is.
struct Config {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = {};

  template <class Kernel>
  Config(Kernel kernel, cudaStream_t stream, int samples, int blocks) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, resident::kSharedBytes),
          "161 KB of shared memory, which sm_86 and sm_89 do not have: cudaFuncSetAttribute");
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(samples * blocks);
    config.blockDim = dim3(resident::kThreads);
    config.dynamicSmemBytes = resident::kSharedBytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = blocks > 1;
  }
};

template <class Half, int BLOCKS, bool DECIDES>
void launch(cudaStream_t stream, int samples, const resident::Batch& batch) {
  const auto kernel = run_resident<Half, BLOCKS, DECIDES>;
  const Config how(kernel, stream, samples, BLOCKS);
  check(cudaLaunchKernelEx(&how.config, kernel, batch), "cudaLaunchKernelEx");
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

int count_resident_clusters(int blocks) {
  using hardware::Float16;
  const auto kernel = blocks == 2 ? run_resident<Float16, 2, false> : run_resident<Float16, 4, false>;
  const Config how(kernel, nullptr, 1, blocks);
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &how.config), "cudaOccupancyMaxActiveClusters");
  return count;
}

void launch_resident(uint64_t stream_handle, const ResidentLaunch& how, const ResidentPart& part,
                     const ResidentPart* policy) {
  if (how.size < 4 || how.size > 32 || how.size % 4 || part.ends[2] > resident::kMaxColumns ||
      (policy && (policy->ends[2] > resident::kMaxColumns || policy->outputs != part.ends[2]))) {
    throw std::runtime_error(
        "launch_resident: images of 4, 8, ... or 32 pixels, at most 512 blocks, and a policy for each of them");
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
