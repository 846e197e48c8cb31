// The only file that knows both sides: Python's numbers in, the entry points' structs out. Addresses come as integers,
// so the module needs no PyTorch to build and serves every PyTorch. Every kernel runs without Python's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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
// dtypes: of x and of y
inti::DepthwiseConv3dShape depthwise_conv3d_shape(const std::array<int64_t, 7>& s, int kernel_space,
                                                  const std::array<std::string, 2>& types, int threads) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], kernel_space, dtype(types[0]), dtype(types[1]), threads};
}

void depthwise_conv3d_forward(const std::array<int64_t, 7>& shape, int kernel_space,
                              const std::array<std::string, 2>& types, int threads, Address x,
                              const StrideArray& x_strides, Address weight, Address bias, Address position, Address y) {
  inti::DepthwiseConv3dForward p{};
  p.shape = depthwise_conv3d_shape(shape, kernel_space, types, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.weight = pointer(weight);
  p.bias = pointer(bias);
  p.position = pointer(position);
  p.y = pointer(y);
  call(inti::cpu_kernels().depthwise_conv3d_forward, p);
}

void depthwise_conv3d_backward(const std::array<int64_t, 7>& shape, int kernel_space,
                               const std::array<std::string, 2>& types, int threads, Address x,
                               const StrideArray& x_strides, Address weight, Address position, Address grad_y,
                               const StrideArray& grad_y_strides, Address grad_x, bool accumulate,
                               Address grad_position, Address position_partials, Address grad_weight,
                               Address weight_partials) {
  inti::DepthwiseConv3dBackward p{};
  p.shape = depthwise_conv3d_shape(shape, kernel_space, types, threads);
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

// shape: (batch, frames, tokens, dim, width, first frame, count); dtypes: of x, the network and the products
inti::TokenFeaturesShape token_features_shape(const std::array<int64_t, 7>& s, const std::array<std::string, 3>& types,
                                              int threads) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], dtype(types[0]), dtype(types[1]), dtype(types[2]), threads};
}

// Of all but what a pass alone has.
inti::TokenFeaturesNormalize token_features_norm(const std::array<int64_t, 7>& shape,
                                                 const std::array<std::string, 3>& types, int threads, Address x,
                                                 const StrideArray& x_strides, Address position, Address norm_weight,
                                                 Address norm_bias, double eps, Address statistics) {
  inti::TokenFeaturesNormalize p{};
  p.shape = token_features_shape(shape, types, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.position = pointer(position);
  p.norm_weight = pointer(norm_weight);
  p.norm_bias = pointer(norm_bias);
  p.eps = eps;
  p.statistics = pointer(statistics);
  return p;
}

void token_features_normalize(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types, int threads,
                              Address x, const StrideArray& x_strides, Address position, Address norm_weight,
                              Address norm_bias, double eps, Address statistics, bool have_statistics,
                              Address normalized) {
  inti::TokenFeaturesNormalize p =
      token_features_norm(shape, types, threads, x, x_strides, position, norm_weight, norm_bias, eps, statistics);
  p.have_statistics = have_statistics;
  p.normalized = pointer(normalized);
  call(inti::cpu_kernels().token_features_normalize, p);
}

void token_features_activation(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types,
                               int threads, Address product, Address bias, Address features, Address preactivation) {
  inti::TokenFeaturesActivation p{};
  p.shape = token_features_shape(shape, types, threads);
  p.product = pointer(product);
  p.bias = pointer(bias);
  p.features = pointer(features);
  p.preactivation = pointer(preactivation);
  call(inti::cpu_kernels().token_features_activation, p);
}

void token_features_forward(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types, int threads,
                            Address x, const StrideArray& x_strides, Address position, Address norm_weight,
                            Address norm_bias, double eps, Address statistics, Address weight, Address bias,
                            Address features, Address preactivation, Address workspace) {
  inti::TokenFeaturesForward p{};
  p.norm = token_features_norm(shape, types, threads, x, x_strides, position, norm_weight, norm_bias, eps, statistics);
  p.activation.shape = p.norm.shape;
  p.activation.bias = pointer(bias);
  p.activation.features = pointer(features);
  p.activation.preactivation = pointer(preactivation);
  p.weight = pointer<float>(weight);
  p.workspace = pointer<float>(workspace);
  call(inti::cpu_kernels().token_features_forward, p);
}

void token_features_activation_backward(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types,
                                        int threads, Address grad_features, int64_t grad_features_pitch,
                                        Address preactivation, Address grad_preactivation, Address partials) {
  inti::TokenFeaturesActivationBackward p{};
  p.shape = token_features_shape(shape, types, threads);
  p.grad_features = pointer(grad_features);
  p.grad_features_pitch = grad_features_pitch;
  p.preactivation = pointer(preactivation);
  p.grad_preactivation = pointer(grad_preactivation);
  p.partials = pointer(partials);
  call(inti::cpu_kernels().token_features_activation_backward, p);
}

void token_features_norm_backward(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types,
                                  int threads, Address x, const StrideArray& x_strides, Address position,
                                  Address norm_weight, Address statistics, Address grad_normalized, Address grad_x,
                                  bool accumulate, Address partials) {
  inti::TokenFeaturesNormBackward p{};
  p.shape = token_features_shape(shape, types, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.position = pointer(position);
  p.norm_weight = pointer(norm_weight);
  p.statistics = pointer(statistics);
  p.grad_normalized = pointer(grad_normalized);
  p.grad_x = pointer(grad_x);
  p.accumulate = accumulate;
  p.partials = pointer(partials);
  call(inti::cpu_kernels().token_features_norm_backward, p);
}

// shape: (batch, frames, tokens, dim, hidden, first pair of frames, count); dtypes: of x, the network and the products
inti::InterpolationHeadShape interpolation_head_shape(const std::array<int64_t, 7>& s,
                                                      const std::array<std::string, 3>& types, int threads) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], dtype(types[0]), dtype(types[1]), dtype(types[2]), threads};
}

// What stands behind the first Linear's products.
inti::InterpolationHeadForward interpolation_head_pass(const std::array<int64_t, 7>& shape,
                                                       const std::array<std::string, 3>& types, int threads,
                                                       Address frame_bias, int64_t frame_bias_pitch, Address weight2,
                                                       double bias2, Address x, const StrideArray& x_strides,
                                                       Address position, Address preactivation, Address z,
                                                       Address weights, Address difference) {
  inti::InterpolationHeadForward p{};
  p.shape = interpolation_head_shape(shape, types, threads);
  p.frame_bias = pointer(frame_bias);
  p.frame_bias_pitch = frame_bias_pitch;
  p.weight2 = pointer(weight2);
  p.bias2 = bias2;
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.position = pointer(position);
  p.preactivation = pointer(preactivation);
  p.z = pointer(z);
  p.weights = pointer(weights);
  p.difference = pointer(difference);
  return p;
}

void interpolation_head_forward(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types,
                                int threads, Address product, Address frame_bias, int64_t frame_bias_pitch,
                                Address weight2, double bias2, Address x, const StrideArray& x_strides,
                                Address position, Address preactivation, Address z, Address weights,
                                Address difference) {
  inti::InterpolationHeadForward p =
      interpolation_head_pass(shape, types, threads, frame_bias, frame_bias_pitch, weight2, bias2, x, x_strides,
                              position, preactivation, z, weights, difference);
  p.product = pointer(product);
  call(inti::cpu_kernels().interpolation_head_forward, p);
}

void interpolation_head_network(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types,
                                int threads, const std::array<int64_t, 2>& widths, Address features, Address cube,
                                Address weight1, int64_t weight1_pitch, Address frame_bias, int64_t frame_bias_pitch,
                                Address weight2, double bias2, Address x, const StrideArray& x_strides,
                                Address position, Address preactivation, Address z, Address weights, Address difference,
                                Address workspace) {
  inti::InterpolationHeadNetwork p{};
  p.pass = interpolation_head_pass(shape, types, threads, frame_bias, frame_bias_pitch, weight2, bias2, x, x_strides,
                                   position, preactivation, z, weights, difference);
  p.features = pointer(features);
  p.cube = pointer(cube);
  p.width = widths[0];
  p.context = widths[1];
  p.weight1 = pointer<float>(weight1);
  p.weight1_pitch = weight1_pitch;
  p.workspace = pointer<float>(workspace);
  call(inti::cpu_kernels().interpolation_head_network, p);
}

void interpolation_head_backward(const std::array<int64_t, 7>& shape, const std::array<std::string, 3>& types,
                                 int threads, Address x, const StrideArray& x_strides, Address position,
                                 Address difference, Address grad_z, const StrideArray& grad_z_strides,
                                 Address grad_weights, Address preactivation, Address weight2, Address grad_x,
                                 bool accumulate, Address position_partials, Address grad_difference,
                                 Address grad_hidden, Address hidden_partials) {
  inti::InterpolationHeadBackward p{};
  p.shape = interpolation_head_shape(shape, types, threads);
  p.x = pointer(x);
  p.x_strides = strides(x_strides);
  p.position = pointer(position);
  p.difference = pointer(difference);
  p.grad_z = pointer(grad_z);
  p.grad_z_strides = strides(grad_z_strides);
  p.grad_weights = pointer(grad_weights);
  p.preactivation = pointer(preactivation);
  p.weight2 = pointer(weight2);
  p.grad_x = pointer(grad_x);
  p.accumulate = accumulate;
  p.position_partials = pointer(position_partials);
  p.grad_difference = pointer(grad_difference);
  p.grad_hidden = pointer(grad_hidden);
  p.hidden_partials = pointer(hidden_partials);
  call(inti::cpu_kernels().interpolation_head_backward, p);
}

// shape: (rows, in, out); type: of the weight
inti::FewRowsShape few_rows_shape(const std::array<int64_t, 3>& s, const std::string& type, int threads) {
  return {s[0], s[1], s[2], dtype(type), threads};
}

// A Linear, as the head has it; the layers of the frame level are called by class_levels.
void few_rows_forward(const std::array<int64_t, 3>& shape, const std::string& type, int threads, Address x,
                      Address weight, int64_t weight_pitch, Address bias, Address y) {
  inti::FewRowsForward p{};
  p.shape = few_rows_shape(shape, type, threads);
  p.x = pointer(x);
  p.weight = pointer(weight);
  p.weight_pitch = weight_pitch;
  p.bias = pointer(bias);
  p.preactivation = pointer(y);
  call(inti::cpu_kernels().few_rows_forward, p);
}

void few_rows_backward(const std::array<int64_t, 3>& shape, const std::string& type, int threads, Address grad_y,
                       int64_t grad_y_pitch, Address x, Address weight, int64_t weight_pitch, Address grad_x,
                       Address grad_weight, int64_t grad_weight_pitch, bool accumulate, Address grad_bias,
                       Address grad_preactivation) {
  inti::FewRowsBackward p{};
  p.shape = few_rows_shape(shape, type, threads);
  p.grad_y = pointer(grad_y);
  p.grad_y_pitch = grad_y_pitch;
  p.x = pointer(x);
  p.weight = pointer(weight);
  p.weight_pitch = weight_pitch;
  p.grad_x = pointer(grad_x);
  p.grad_weight = pointer(grad_weight);
  p.grad_weight_pitch = grad_weight_pitch;
  p.accumulate = accumulate;
  p.grad_bias = pointer(grad_bias);
  p.grad_preactivation = pointer(grad_preactivation);
  call(inti::cpu_kernels().few_rows_backward, p);
}

template <size_t n>
using Addresses = std::array<Address, n>;

template <size_t n, class T>
void pointers(const Addresses<n>& addresses, T** to) {
  std::transform(addresses.begin(), addresses.end(), to, pointer<T>);
}

using FrameAddresses = Addresses<inti::kFrameParameters>;
using GlobalAddresses = Addresses<inti::kGlobalParameters>;

// shape: (batch, frames, dim, half); dtypes: of x and of the rest
inti::ClassLevels class_levels(const std::array<int64_t, 4>& s, const std::array<std::string, 2>& types, int threads,
                               Address x, const std::array<int64_t, 2>& x_strides, Address position,
                               const FrameAddresses& frame, const GlobalAddresses& convolutions,
                               const std::array<double, 2>& eps, Address workspace) {
  inti::ClassLevels p{};
  p.shape = {s[0], s[1], s[2], s[3], dtype(types[0]), dtype(types[1]), threads};
  p.x = pointer(x);
  p.x_strides = {x_strides[0], x_strides[1], 0};
  p.position = pointer(position);
  pointers(frame, p.frame);
  pointers(convolutions, p.convolutions);
  std::copy(eps.begin(), eps.end(), p.eps);
  p.workspace = pointer(workspace);
  return p;
}

void class_levels_forward(const std::array<int64_t, 4>& shape, const std::array<std::string, 2>& types, int threads,
                          Address x, const std::array<int64_t, 2>& x_strides, Address position,
                          const FrameAddresses& frame, const GlobalAddresses& convolutions,
                          const std::array<double, 2>& eps, Address workspace, Address frame_preactivation,
                          Address pair_preactivation, Address context) {
  inti::ClassLevelsForward p{};
  p.levels = class_levels(shape, types, threads, x, x_strides, position, frame, convolutions, eps, workspace);
  p.frame_preactivation = pointer(frame_preactivation);
  p.pair_preactivation = pointer(pair_preactivation);
  p.context = pointer(context);
  call(inti::cpu_kernels().class_levels_forward, p);
}

void class_levels_backward(const std::array<int64_t, 4>& shape, const std::array<std::string, 2>& types, int threads,
                           Address x, const std::array<int64_t, 2>& x_strides, Address position,
                           const FrameAddresses& frame, const GlobalAddresses& convolutions,
                           const std::array<double, 2>& eps, Address workspace, Address frame_preactivation,
                           Address pair_preactivation, Address grad_context, Address grad_x,
                           const FrameAddresses& grad_frame, const GlobalAddresses& grad_convolutions) {
  inti::ClassLevelsBackward p{};
  p.levels = class_levels(shape, types, threads, x, x_strides, position, frame, convolutions, eps, workspace);
  p.frame_preactivation = pointer(frame_preactivation);
  p.pair_preactivation = pointer(pair_preactivation);
  p.grad_context = pointer(grad_context);
  p.grad_x = pointer(grad_x);
  pointers(grad_frame, p.grad_frame);
  pointers(grad_convolutions, p.grad_convolutions);
  call(inti::cpu_kernels().class_levels_backward, p);
}

// shape: (count, terms, columns)
void partial_sums(const std::array<int64_t, 3>& shape, const std::string& type, int threads, Address partials,
                  Address sums) {
  inti::PartialSums p{};
  p.count = shape[0];
  p.terms = shape[1];
  p.columns = shape[2];
  p.dtype = dtype(type);
  p.partials = pointer(partials);
  p.sums = pointer(sums);
  p.threads = threads;
  call(inti::cpu_kernels().partial_sums, p);
}

// shape: (rows, columns, depth)
void product(const std::array<int64_t, 3>& shape, int threads, Address a, const std::array<int64_t, 2>& a_strides,
             Address b, const std::array<int64_t, 2>& b_strides, Address c, int64_t c_pitch, bool accumulate,
             Address workspace) {
  inti::Product p{};
  p.rows = shape[0];
  p.columns = shape[1];
  p.depth = shape[2];
  p.a = pointer<float>(a);
  std::copy(a_strides.begin(), a_strides.end(), p.a_strides);
  p.b = pointer<float>(b);
  std::copy(b_strides.begin(), b_strides.end(), p.b_strides);
  p.c = pointer<float>(c);
  p.c_pitch = c_pitch;
  p.accumulate = accumulate;
  p.workspace = pointer<float>(workspace);
  p.threads = threads;
  call(inti::cpu_kernels().product, p);
}

int64_t product_workspace(int64_t columns, int64_t depth, int threads) {
  return inti::gemm_workspace(columns, std::min(depth, inti::kProductDepth), threads);
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
  m.def("depthwise_conv3d_forward", &depthwise_conv3d_forward, py::kw_only(), "shape"_a, "kernel_space"_a, "dtypes"_a,
        "threads"_a, "x"_a, "x_strides"_a, "weight"_a, "bias"_a, "position"_a, "y"_a);
  m.def("depthwise_conv3d_backward", &depthwise_conv3d_backward, py::kw_only(), "shape"_a, "kernel_space"_a, "dtypes"_a,
        "threads"_a, "x"_a, "x_strides"_a, "weight"_a, "position"_a, "grad_y"_a, "grad_y_strides"_a, "grad_x"_a,
        "accumulate"_a, "grad_position"_a, "position_partials"_a, "grad_weight"_a, "weight_partials"_a);

  m.def("token_blocks", &inti::token_blocks, "tokens"_a);
  m.def("partial_sums", &partial_sums, py::kw_only(), "shape"_a, "dtype"_a, "threads"_a, "partials"_a, "sums"_a);
  m.def("gemm_workspace", &inti::gemm_workspace, "columns"_a, "depth"_a, "threads"_a);
  m.def("network_workspace", &inti::network_workspace, "columns"_a, "depth"_a, "rows"_a, "threads"_a);
  m.def("product_workspace", &product_workspace, "columns"_a, "depth"_a, "threads"_a);
  m.def("product", &product, py::kw_only(), "shape"_a, "threads"_a, "a"_a, "a_strides"_a, "b"_a, "b_strides"_a, "c"_a,
        "c_pitch"_a, "accumulate"_a, "workspace"_a);
  m.def("token_features_normalize", &token_features_normalize, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a, "x"_a,
        "x_strides"_a, "position"_a, "norm_weight"_a, "norm_bias"_a, "eps"_a, "statistics"_a, "have_statistics"_a,
        "normalized"_a);
  m.def("token_features_activation", &token_features_activation, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a,
        "product"_a, "bias"_a, "features"_a, "preactivation"_a);
  m.def("token_features_forward", &token_features_forward, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a, "x"_a,
        "x_strides"_a, "position"_a, "norm_weight"_a, "norm_bias"_a, "eps"_a, "statistics"_a, "weight"_a, "bias"_a,
        "features"_a, "preactivation"_a, "workspace"_a);
  m.def("token_features_activation_backward", &token_features_activation_backward, py::kw_only(), "shape"_a, "dtypes"_a,
        "threads"_a, "grad_features"_a, "grad_features_pitch"_a, "preactivation"_a, "grad_preactivation"_a,
        "partials"_a);
  m.def("token_features_norm_backward", &token_features_norm_backward, py::kw_only(), "shape"_a, "dtypes"_a,
        "threads"_a, "x"_a, "x_strides"_a, "position"_a, "norm_weight"_a, "statistics"_a, "grad_normalized"_a,
        "grad_x"_a, "accumulate"_a, "partials"_a);

  m.def("interpolation_head_forward", &interpolation_head_forward, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a,
        "product"_a, "frame_bias"_a, "frame_bias_pitch"_a, "weight2"_a, "bias2"_a, "x"_a, "x_strides"_a, "position"_a,
        "preactivation"_a, "z"_a, "weights"_a, "difference"_a);
  m.def("interpolation_head_network", &interpolation_head_network, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a,
        "widths"_a, "features"_a, "cube"_a, "weight1"_a, "weight1_pitch"_a, "frame_bias"_a, "frame_bias_pitch"_a,
        "weight2"_a, "bias2"_a, "x"_a, "x_strides"_a, "position"_a, "preactivation"_a, "z"_a, "weights"_a,
        "difference"_a, "workspace"_a);
  m.def("interpolation_head_backward", &interpolation_head_backward, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a,
        "x"_a, "x_strides"_a, "position"_a, "difference"_a, "grad_z"_a, "grad_z_strides"_a, "grad_weights"_a,
        "preactivation"_a, "weight2"_a, "grad_x"_a, "accumulate"_a, "position_partials"_a, "grad_difference"_a,
        "grad_hidden"_a, "hidden_partials"_a);

  m.def("few_rows_forward", &few_rows_forward, py::kw_only(), "shape"_a, "dtype"_a, "threads"_a, "x"_a, "weight"_a,
        "weight_pitch"_a, "bias"_a, "y"_a);
  m.def("few_rows_backward", &few_rows_backward, py::kw_only(), "shape"_a, "dtype"_a, "threads"_a, "grad_y"_a,
        "grad_y_pitch"_a, "x"_a, "weight"_a, "weight_pitch"_a, "grad_x"_a, "grad_weight"_a, "grad_weight_pitch"_a,
        "accumulate"_a, "grad_bias"_a, "grad_preactivation"_a);
  m.def("class_levels_workspace", &inti::class_levels_workspace, "batch"_a, "frames"_a, "dim"_a, "half"_a, "threads"_a);
  m.def("class_levels_forward", &class_levels_forward, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a, "x"_a,
        "x_strides"_a, "position"_a, "frame"_a, "convolutions"_a, "eps"_a, "workspace"_a, "frame_preactivation"_a,
        "pair_preactivation"_a, "context"_a);
  m.def("class_levels_backward", &class_levels_backward, py::kw_only(), "shape"_a, "dtypes"_a, "threads"_a, "x"_a,
        "x_strides"_a, "position"_a, "frame"_a, "convolutions"_a, "eps"_a, "workspace"_a, "frame_preactivation"_a,
        "pair_preactivation"_a, "grad_context"_a, "grad_x"_a, "grad_frame"_a, "grad_convolutions"_a);
}
