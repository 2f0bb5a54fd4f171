// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dynexec {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of somebody else reports it
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

}  // namespace dynexec
