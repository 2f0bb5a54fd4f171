// dynexec._cuda: what needs the CUDA runtime and not torch. Streams and memory come as numbers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "conditional.h"

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Conditional nodes of CUDA graphs.";
  using namespace pybind11::literals;
  module.def("prepare_conditional", &dynexec::prepare_conditional);
  module.def("insert_conditional", &dynexec::insert_conditional, "stream"_a, "offset"_a, "size"_a, "bodies"_a);
  module.def("begin_body", &dynexec::begin_body, "stream"_a, "body"_a);
  module.def("end_body", &dynexec::end_body, "stream"_a);
}
