// The only file that knows both sides: Python's numbers in, the entry points' structs out. Addresses come as integers,
// so the module needs no PyTorch to build and serves every PyTorch. Every kernel runs without Python's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "inti/build_info.h"
#include "inti/cpu.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = uintptr_t;
using StrideArray = std::array<int64_t, 3>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inti::Strides strides(const StrideArray& s) { return {s[0], s[1], s[2]}; }

template <class Params>
void call(void (*kernel)(const Params&), const Params& params) {
  py::gil_scoped_release release;
  kernel(params);
}

// shape: (batch, frames, tokens, dim)
inti::PairInterpolateShape pair_interpolate_shape(const std::array<int64_t, 4>& s, const std::string& type,
                                                  int threads) {
  return {s[0], s[1], s[2], s[3], dtype(type), threads};
}

void pair_interpolate_forward(const std::array<int64_t, 4>& shape, const std::string& type, int threads, Address x,
                              const StrideArray& x_strides, Address logits, Address position, Address z,
                              Address weights) {
  inti::PairInterpolateForward p{};
  p.shape = pair_interpolate_shape(shape, type, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.logits = pointer<double>(logits);
  p.position = pointer(position);
  p.z = pointer(z);
  p.weights = pointer<double>(weights);
  call(inti::cpu_kernels().pair_interpolate_forward, p);
}

void pair_interpolate_backward(const std::array<int64_t, 4>& shape, const std::string& type, int threads, Address x,
                               const StrideArray& x_strides, Address logits, Address position, Address grad_z,
                               const StrideArray& grad_z_strides, Address grad_weights, Address grad_x, bool accumulate,
                               Address grad_logits, Address grad_position, Address partials) {
  inti::PairInterpolateBackward p{};
  p.shape = pair_interpolate_shape(shape, type, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.logits = pointer<double>(logits);
  p.position = pointer(position);
  p.grad_z = pointer(grad_z);
  p.grad_z_strides = strides(grad_z_strides);
  p.grad_weights = pointer<double>(grad_weights);
  p.grad_x = pointer(grad_x);
  p.accumulate = accumulate;
  p.grad_logits = pointer<double>(grad_logits);
  p.grad_position = pointer(grad_position);
  p.partials = pointer(partials);
  call(inti::cpu_kernels().pair_interpolate_backward, p);
}

// shape: (batch, frames, prefix, height, width, dim, temporal_stride)
inti::DepthwiseConv3dShape depthwise_conv3d_shape(const std::array<int64_t, 7>& s, int kernel_space,
                                                  const std::string& type, int threads) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], kernel_space, dtype(type), threads};
}

void depthwise_conv3d_forward(const std::array<int64_t, 7>& shape, int kernel_space, const std::string& type,
                              int threads, Address x, const StrideArray& x_strides, Address weight, Address bias,
                              Address position, Address y) {
  inti::DepthwiseConv3dForward p{};
  p.shape = depthwise_conv3d_shape(shape, kernel_space, type, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.weight = pointer(weight);
  p.bias = pointer(bias);
  p.position = pointer(position);
  p.y = pointer(y);
  call(inti::cpu_kernels().depthwise_conv3d_forward, p);
}

void depthwise_conv3d_backward(const std::array<int64_t, 7>& shape, int kernel_space, const std::string& type,
                               int threads, Address x, const StrideArray& x_strides, Address weight, Address position,
                               Address grad_y, const StrideArray& grad_y_strides, Address grad_x, bool accumulate,
                               Address grad_position, Address position_partials, Address grad_weight,
                               Address weight_partials) {
  inti::DepthwiseConv3dBackward p{};
  p.shape = depthwise_conv3d_shape(shape, kernel_space, type, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.weight = pointer(weight);
  p.position = pointer(position);
  p.grad_y = pointer(grad_y);
  p.grad_y_strides = strides(grad_y_strides);
  p.grad_x = pointer(grad_x);
  p.accumulate = accumulate;
  p.grad_position = pointer(grad_position);
  p.position_partials = pointer(position_partials);
  p.grad_weight = pointer(grad_weight);
  p.weight_partials = pointer(weight_partials);
  call(inti::cpu_kernels().depthwise_conv3d_backward, p);
}

py::dict build_info() {
  return py::dict("version"_a = INTI_VERSION, "compiler"_a = INTI_COMPILER, "flags"_a = INTI_CXX_FLAGS,
                  "cpu_isas"_a = INTI_CPU_ISAS, "openmp"_a = bool(INTI_OPENMP), "cuda_archs"_a = INTI_CUDA_ARCHS);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of inti_kernels: tensors as addresses. Use inti_kernels.ops.";
  m.def("build_info", &build_info, "How this module was built.");
  m.def("cpu_isas", &inti::cpu_isas, "Instruction sets that were built and that this processor has, slowest first.");
  m.def("cpu_isa", &inti::cpu_isa, "The instruction set in use.");
  m.def("set_cpu_isa", &inti::set_cpu_isa, "name"_a, "Uses another of cpu_isas(); for tests.");

  m.def("pair_interpolate_chunks", &inti::pair_interpolate_chunks, "tokens"_a);
  m.def("pair_interpolate_forward", &pair_interpolate_forward, py::kw_only(), "shape"_a, "dtype"_a, "threads"_a, "x"_a,
        "x_strides"_a, "logits"_a, "position"_a, "z"_a, "weights"_a);
  m.def("pair_interpolate_backward", &pair_interpolate_backward, py::kw_only(), "shape"_a, "dtype"_a, "threads"_a,
        "x"_a, "x_strides"_a, "logits"_a, "position"_a, "grad_z"_a, "grad_z_strides"_a, "grad_weights"_a, "grad_x"_a,
        "accumulate"_a, "grad_logits"_a, "grad_position"_a, "partials"_a);

  m.def("depthwise_conv3d_chunks", &inti::depthwise_conv3d_chunks, "batch"_a, "out_frames"_a);
  m.def("depthwise_conv3d_forward", &depthwise_conv3d_forward, py::kw_only(), "shape"_a, "kernel_space"_a, "dtype"_a,
        "threads"_a, "x"_a, "x_strides"_a, "weight"_a, "bias"_a, "position"_a, "y"_a);
  m.def("depthwise_conv3d_backward", &depthwise_conv3d_backward, py::kw_only(), "shape"_a, "kernel_space"_a, "dtype"_a,
        "threads"_a, "x"_a, "x_strides"_a, "weight"_a, "position"_a, "grad_y"_a, "grad_y_strides"_a, "grad_x"_a,
        "accumulate"_a, "grad_position"_a, "position_partials"_a, "grad_weight"_a, "weight_partials"_a);
}
