// Conditional nodes added to a stream's capture. See conditional.h.
#include "conditional.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "check.h"

#if CUDART_VERSION < 13000
#error "conditional nodes with edge data in captures need CUDA 13"
#endif

namespace dynexec {
namespace {

__global__ void choose_body(cudaGraphConditionalHandle handle, const int* offset, int size, unsigned bodies) {
  const int count = offset[1] - offset[0];
  if (size == 0) {
    cudaGraphSetConditional(handle, count > 0);
  } else {
    const unsigned body = (count + size - 1) / size;
    cudaGraphSetConditional(handle, body < bodies ? body : bodies - 1);
  }
}

struct Capture {
  cudaGraph_t graph;
  const cudaGraphNode_t* nodes;
  const cudaGraphEdgeData* edges;
  size_t count;
};

// The graph that the stream is captured into, and the nodes that its next one will wait for.
Capture find_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  Capture found;
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &found.graph, &found.nodes, &found.edges, &found.count),
        "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) throw std::runtime_error("the stream is not being captured");
  return found;
}

}  // namespace

void prepare_conditional() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, choose_body), "cudaFuncGetAttributes");
}

std::vector<uint64_t> insert_conditional(uint64_t stream_handle, uint64_t offset, int64_t size, uint32_t bodies) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  if (size < 0 || size > INT32_MAX || bodies < 1 || (size == 0 && bodies != 1)) {
    throw std::runtime_error("insert_conditional: one body where size is 0, else size > 0 and one or more");
  }
  cudaGraphConditionalHandle handle;
  check(cudaGraphConditionalHandleCreate(&handle, find_capture(stream).graph, 0, cudaGraphCondAssignDefault),
        "cudaGraphConditionalHandleCreate");
  choose_body<<<1, 1, 0, stream>>>(handle, reinterpret_cast<const int*>(offset), static_cast<int>(size), bodies);
  check(cudaGetLastError(), "choose_body");
  const Capture capture = find_capture(stream);  // the kernel is in it now
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = size == 0 ? cudaGraphCondTypeIf : cudaGraphCondTypeSwitch;
  params.conditional.size = bodies;
  cudaGraphNode_t node;
  check(cudaGraphAddNode(&node, capture.graph, capture.nodes, capture.edges, capture.count, &params),
        "cudaGraphAddNode");
  check(cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies),
        "cudaStreamUpdateCaptureDependencies");
  std::vector<uint64_t> found;
  for (uint32_t body = 0; body < bodies; ++body) {
    found.push_back(reinterpret_cast<uint64_t>(params.conditional.phGraph_out[body]));
  }
  return found;
}

void begin_body(uint64_t stream, uint64_t body) {
  // Relaxed: what else the process does meanwhile, on other threads too, is none of this capture's business.
  check(cudaStreamBeginCaptureToGraph(reinterpret_cast<cudaStream_t>(stream), reinterpret_cast<cudaGraph_t>(body),
                                      nullptr, nullptr, 0, cudaStreamCaptureModeRelaxed),
        "cudaStreamBeginCaptureToGraph");
}

void end_body(uint64_t stream) {
  cudaGraph_t graph;
  check(cudaStreamEndCapture(reinterpret_cast<cudaStream_t>(stream), &graph), "cudaStreamEndCapture");
}

}  // namespace dynexec
