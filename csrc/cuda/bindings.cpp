// dynexec._cuda: what needs the CUDA runtime and not torch. Streams and memory come as numbers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "conditional.h"
#include "resident_launch.h"

namespace {

// weights, biases, convs, head, head biases, three ends, outputs
dynexec::ResidentPart part(const std::array<uint64_t, 9>& of) {
  return {of[0], of[1], of[2], of[3], of[4], {int(of[5]), int(of[6]), int(of[7])}, int(of[8])};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Conditional nodes of CUDA graphs, and the kernel that runs whole networks.";
  namespace py = pybind11;
  using namespace pybind11::literals;
  module.def("prepare_conditional", &dynexec::prepare_conditional);
  module.def("insert_conditional", &dynexec::insert_conditional, "stream"_a, "offset"_a, "size"_a, "bodies"_a);
  module.def("begin_body", &dynexec::begin_body, "stream"_a, "body"_a);
  module.def("end_body", &dynexec::end_body, "stream"_a);
  module.def("count_resident_clusters", &dynexec::count_resident_clusters, "blocks"_a);
  module.def(
      "launch_resident",
      [](uint64_t stream, uint64_t images, std::array<int64_t, 4> strides, int samples, int size, uint64_t given,
         uint64_t decided, uint64_t results, uint64_t order, bool bfloat16, int blocks,
         const std::array<uint64_t, 9>& network, const std::optional<std::array<uint64_t, 9>>& policy) {
        const dynexec::ResidentLaunch how = {images, {strides[0], strides[1], strides[2], strides[3]}, samples, size,
                                             given,  decided, results, order, bfloat16, blocks};
        const dynexec::ResidentPart decides = policy ? part(*policy) : dynexec::ResidentPart{};
        dynexec::launch_resident(stream, how, part(network), policy ? &decides : nullptr);
      },
      "stream"_a, py::kw_only(), "images"_a, "strides"_a, "samples"_a, "size"_a, "given"_a, "decided"_a, "results"_a,
      "order"_a, "bfloat16"_a, "blocks"_a, "network"_a, "policy"_a);
}
