// dynexec._C: how the native part was built. The ops are in csrc/cpu, a library of its own that needs no Python.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.doc() = "How the native part of dynexec was built.";
  module.attr("compiler") = DYNEXEC_COMPILER;
  module.attr("flags") = DYNEXEC_FLAGS;
  module.attr("torch") = DYNEXEC_TORCH;
}
