// Python sees addresses as integers: the extension needs neither torch's headers nor its ABI.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels; see oapl_kernels.epilogue_cpu, .matmul and .weight_pack.";

  py::class_<oapl::Logits>(module, "Logits")
      .def(py::init([](Address data, int64_t stride, int64_t rows, int64_t vocabulary, Address target,
                       float temperature, float softcap) {
             const oapl::Scale scale{1.f / temperature, softcap, softcap > 0 ? 1.f / softcap : 0.f};
             return oapl::Logits{at<float>(data), stride, rows, vocabulary, at<const int64_t>(target), scale};
           }));

  const py::call_guard<py::gil_scoped_release> without_lock;
  module.def("statistics", [](const oapl::Logits& logits, Address out, int64_t out_stride, int threads) {
    oapl::statistics(logits, {at<float>(out), out_stride}, threads);
  }, without_lock);
  module.def("gradient", [](const oapl::Logits& logits, Address statistics, int64_t statistics_stride,
                            Address coefficient, Address entropy_coefficient, bool bf16, int threads) {
    oapl::gradient(logits, {at<float>(statistics), statistics_stride},
                   {at<const float>(coefficient), at<const float>(entropy_coefficient)}, bf16, threads);
  }, without_lock);
  module.def("accumulate", [](Address sums, Address products, int64_t count, bool add, int threads) {
    oapl::accumulate(at<float>(sums), at<const uint16_t>(products), count, add, threads);
  }, without_lock);

  using Strides = std::pair<int64_t, int64_t>;
  module.def("multiplies", &oapl::multiplies);
  module.def("multiply", [](Address left, Strides left_strides, Address right, Strides right_strides, Address out,
                            int64_t out_stride, int64_t rows, int64_t columns, int64_t depth, bool add, bool bf16,
                            int threads) {
    oapl::multiply({{at<const void>(left), left_strides.first, left_strides.second},
                    {at<const void>(right), right_strides.first, right_strides.second},
                    rows, columns, depth, at<float>(out), out_stride, add},
                   bf16, threads);
  }, without_lock);

  py::class_<oapl::Seeds>(module, "Seeds").def(py::init<uint32_t, uint32_t>());
  py::enum_<oapl::Format>(module, "Format")
      .value("float32", oapl::Format::float32)
      .value("bfloat16", oapl::Format::bfloat16)
      .value("float16", oapl::Format::float16);

  py::class_<oapl::Bytes>(module, "Bytes").def(py::init([](Address at_address, int64_t count) {
    return oapl::Bytes{at<const unsigned char>(at_address), count};
  }));
  py::class_<oapl::Cast>(module, "Cast")
      .def(py::init([](Address source, oapl::Format from, Address payload, oapl::Format to, int64_t count) {
        return oapl::Cast{at<const void>(source), from, at<void>(payload), to, count};
      }));
  py::class_<oapl::Copy>(module, "Copy").def(py::init([](Address source, Address to, int64_t count, int bytes) {
    return oapl::Copy{at<const void>(source), at<void>(to), count, bytes};
  }));
  py::class_<oapl::Digest>(module, "Digest")
      .def_readonly("h0", &oapl::Digest::h0)
      .def_readonly("h1", &oapl::Digest::h1)
      .def_readonly("nonfinite", &oapl::Digest::nonfinite);
  module.def("checksum", &oapl::checksum, without_lock);
  module.def("pack", &oapl::pack, without_lock);
  module.def("copy_and_count_changes", &oapl::copy_and_count_changes, without_lock);

  module.def("instruction_set", [] { return oapl::instruction_set().name; });
  module.def("select_instruction_set", [](const std::string& name) {
    if (!oapl::select_instruction_set(name.c_str()))
      throw py::value_error("instruction set is '" + name +
                            "'; allowed: 'avx512_bf16', 'avx512', 'avx2', 'portable', where the processor has it");
  });
}
