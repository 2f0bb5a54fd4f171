// Launches of the kernel in resident.h, without CUDA's or torch's headers.
#pragma once

#include <cstdint>

namespace dynexec {

// All pointers are on the device; what they point to: resident.h. `policy` is null where decisions are given.
struct ResidentPart {
  uint64_t weights, biases, convs, head, head_biases;
  int ends[3], outputs;
};

struct ResidentLaunch {
  uint64_t images;
  int64_t strides[4];
  int samples, size;
  uint64_t given, decided, results, order;
  bool bfloat16;
  int blocks;  // of a cluster: 1, and from sm_90 on 2 or 4
};

// How many clusters of 2 or 4 blocks run at once on the current device, from sm_90 on.
int count_resident_clusters(int blocks);

// Throws std::runtime_error with the name of the call and CUDA's message.
void launch_resident(uint64_t stream, const ResidentLaunch& launch, const ResidentPart& network,
                     const ResidentPart* policy);

}  // namespace dynexec
