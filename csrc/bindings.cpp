// Python sees addresses as integers: the extension needs neither torch's headers nor its ABI.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "epilogue.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_epilogue, module) {
  module.doc() = "In-place epilogue of a chunk of fp32 logits; see oapl_kernels.epilogue_cpu.";

  py::class_<oapl::Logits>(module, "Logits")
      .def(py::init([](Address data, int64_t stride, int64_t rows, int64_t vocabulary, Address target,
                       float temperature, float softcap) {
             return oapl::Logits{at<float>(data), stride,      rows,   vocabulary,
                                 at<const int64_t>(target), temperature, softcap};
           }),
           py::arg("data"), py::arg("stride"), py::arg("rows"), py::arg("vocabulary"), py::arg("target"),
           py::arg("temperature"), py::arg("softcap"));

  module.def(
      "statistics",
      [](const oapl::Logits& logits, Address out, int64_t out_stride, int threads) {
        py::gil_scoped_release release;
        oapl::statistics(logits, {at<float>(out), out_stride}, threads);
      },
      py::arg("logits"), py::arg("out"), py::arg("out_stride"), py::arg("threads"));

  module.def(
      "gradient",
      [](const oapl::Logits& logits, Address statistics, int64_t statistics_stride, Address coefficient,
         Address entropy_coefficient, bool bf16, int threads) {
        py::gil_scoped_release release;
        oapl::gradient(logits, {at<float>(statistics), statistics_stride},
                       {at<const float>(coefficient), at<const float>(entropy_coefficient)}, bf16, threads);
      },
      py::arg("logits"), py::arg("statistics"), py::arg("statistics_stride"), py::arg("coefficient"),
      py::arg("entropy_coefficient"), py::arg("bf16"), py::arg("threads"));

  module.def(
      "accumulate",
      [](Address sums, Address products, int64_t count, bool add, int threads) {
        py::gil_scoped_release release;
        oapl::accumulate(at<float>(sums), at<const uint16_t>(products), count, add, threads);
      },
      py::arg("sums"), py::arg("products"), py::arg("count"), py::arg("add"), py::arg("threads"));

  module.def(
      "checksum",
      [](Address bytes, int64_t count, uint32_t seed_0, uint32_t seed_1, int threads) {
        py::gil_scoped_release release;
        return oapl::checksum(at<const unsigned char>(bytes), count, seed_0, seed_1, threads);
      },
      py::arg("bytes"), py::arg("count"), py::arg("seed_0"), py::arg("seed_1"), py::arg("threads"));

  module.def("instruction_set", &oapl::instruction_set);
  module.def("select_instruction_set", [](const std::string& name) {
    if (!oapl::select_instruction_set(name.c_str()))
      throw py::value_error("instruction set is '" + name +
                            "'; allowed: 'avx512', 'avx2', 'portable', where the processor has it");
  });
}
