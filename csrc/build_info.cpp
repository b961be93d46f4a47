// How this copy of scatterbrain was built: facts that setup.py passes as macros. pybind11, without torch headers.

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// OpenMP version date of this compilation, 0 without OpenMP.
#if defined(_OPENMP)
constexpr int kOpenMP = _OPENMP;
#else
constexpr int kOpenMP = 0;
#endif

// "a,b" -> ("a", "b"); "" -> ().
py::tuple split(const std::string& list) {
  if (list.empty()) return py::tuple();
  return py::tuple(py::str(list).attr("split")(","));
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How this copy of scatterbrain was built.";
  m.attr("version") = SCATTERBRAIN_VERSION;
  m.attr("torch_version") = SCATTERBRAIN_TORCH_VERSION;
  m.attr("compiler") = kCompiler;
  m.attr("cpp_standard") = static_cast<long>(__cplusplus);
  m.attr("openmp") = kOpenMP;
  m.attr("instruction_sets") = split(SCATTERBRAIN_INSTRUCTION_SETS);
  m.attr("cuda_architectures") = split(SCATTERBRAIN_CUDA_ARCHITECTURES);
}
