// The CUDA kernels' side of what bindings.cpp is for the CPU's: Python's numbers in, the entry points' structs out.
// Addresses come as integers, everything by keyword, and every launch runs without Python's lock. The emulator builds
// this file too (INTI_EMULATED).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dtype.h"
#include "inti/build_info.h"
#include "inti/cuda/class_levels.h"
#include "inti/cuda/code_for.h"
#include "inti/cuda/depthwise_conv3d.h"
#include "inti/cuda/interpolation_head.h"
#include "inti/cuda/pair_interpolate.h"
#include "inti/cuda/partial_sums.h"
#include "inti/cuda/token_features.h"

#ifdef INTI_EMULATED
#include "emulator/counting.h"
#endif

namespace py = pybind11;
using namespace py::literals;
using namespace inti::cuda;

namespace {

// --- Shapes: a tuple with the members in their order, dtypes by name -------------------------------------------------

template <size_t N>
std::array<int64_t, N> sizes(py::handle shape, size_t dtypes) {
  const auto tuple = shape.cast<py::tuple>();
  if (tuple.size() != N + dtypes) throw py::type_error("a shape of another op: " + std::string(py::repr(shape)));
  std::array<int64_t, N> result;
  for (size_t i = 0; i < N; ++i) result[i] = tuple[i].cast<int64_t>();
  return result;
}

inti::DType dtype_at(py::handle shape, size_t i) { return dtype(shape.cast<py::tuple>()[i].cast<std::string>()); }

void convert(py::handle from, PairInterpolateShape& to) {
  const auto s = sizes<4>(from, 2);
  to = {s[0], s[1], s[2], s[3], dtype_at(from, 4), dtype_at(from, 5)};
}

void convert(py::handle from, DepthwiseConv3dShape& to) {
  const auto s = sizes<8>(from, 2);
  to = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], static_cast<int>(s[7]), dtype_at(from, 8), dtype_at(from, 9)};
}

void convert(py::handle from, TokenFeaturesShape& to) {
  const auto s = sizes<5>(from, 1);
  to = {s[0], s[1], s[2], s[3], s[4], dtype_at(from, 5)};
}

void convert(py::handle from, InterpolationHeadShape& to) {
  const auto s = sizes<7>(from, 2);
  to = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], dtype_at(from, 7), dtype_at(from, 8)};
}

void convert(py::handle from, ClassLevelsShape& to) {
  const auto s = sizes<4>(from, 2);
  to = {s[0], s[1], s[2], s[3], dtype_at(from, 4), dtype_at(from, 5)};
}

template <class Shape>
Shape shape(py::handle from) {
  Shape to;
  convert(from, to);
  return to;
}

// --- The other members -----------------------------------------------------------------------------------------------

void convert(py::handle from, const void*& to) { to = reinterpret_cast<const void*>(from.cast<uintptr_t>()); }
void convert(py::handle from, void*& to) { to = reinterpret_cast<void*>(from.cast<uintptr_t>()); }
void convert(py::handle from, bool& to) { to = from.cast<bool>(); }
void convert(py::handle from, double& to) { to = from.cast<double>(); }
void convert(py::handle from, int64_t& to) { to = from.cast<int64_t>(); }
void convert(py::handle from, inti::Strides& to) {
  const auto s = from.cast<std::array<int64_t, 3>>();
  to = {s[0], s[1], s[2]};
}

template <class P, size_t N>
void convert(py::handle from, P (&to)[N]) {
  const auto all = from.cast<py::sequence>();
  if (all.size() != N)
    throw py::type_error("expected " + std::to_string(N) + " addresses, got " + std::to_string(all.size()));
  for (size_t i = 0; i < N; ++i) convert(all[i], to[i]);
}

template <class T>
struct OwnerOf;
template <class P, class M>
struct OwnerOf<M P::*> {
  using type = P;
};

template <auto member>
void set(typename OwnerOf<decltype(member)>::type& params, py::handle value) {
  convert(value, params.*member);
}

// A member of an entry point's struct: its keyword in Python, and how it is filled in. One list, so that a name can't
// be given another's value.
template <class Params>
struct Member {
  const char* name;
  void (*set)(Params&, py::handle);
};

// The entry point as a function of keywords, of all of them.
template <class Params>
void define(py::module_& m, const char* name, void (*entry)(const Params&), std::vector<Member<Params>> members) {
  std::string doc = "Keywords:";
  for (const auto& member : members) doc += std::string(" ") + member.name;
  m.def(
      name,
      [=, members = std::move(members)](const py::kwargs& given) {
        Params params{};
        for (const auto& member : members) {
          PyObject* value = PyDict_GetItemString(given.ptr(), member.name);
          if (!value) throw py::type_error(std::string(name) + " needs the keyword " + member.name);
          member.set(params, value);
        }
        if (given.size() != members.size()) throw py::type_error(std::string(name) + " got a keyword too many");
        py::gil_scoped_release release;
        entry(params);
      },
      doc.c_str());
}

void define_pair_interpolate(py::module_& m) {
  using Forward = PairInterpolateForward;
  define<Forward>(m, "pair_interpolate_forward", &pair_interpolate_forward,
                  {{"shape", &set<&Forward::shape>},
                   {"x", &set<&Forward::x>},
                   {"x_strides", &set<&Forward::x_strides>},
                   {"logits", &set<&Forward::logits>},
                   {"position", &set<&Forward::position>},
                   {"z", &set<&Forward::z>},
                   {"weights", &set<&Forward::weights>},
                   {"stream", &set<&Forward::stream>}});
  using Backward = PairInterpolateBackward;
  define<Backward>(m, "pair_interpolate_backward", &pair_interpolate_backward,
                   {{"shape", &set<&Backward::shape>},
                    {"x", &set<&Backward::x>},
                    {"x_strides", &set<&Backward::x_strides>},
                    {"logits", &set<&Backward::logits>},
                    {"position", &set<&Backward::position>},
                    {"grad_z", &set<&Backward::grad_z>},
                    {"grad_z_strides", &set<&Backward::grad_z_strides>},
                    {"grad_weights", &set<&Backward::grad_weights>},
                    {"grad_x", &set<&Backward::grad_x>},
                    {"accumulate", &set<&Backward::accumulate>},
                    {"grad_logits", &set<&Backward::grad_logits>},
                    {"grad_position", &set<&Backward::grad_position>},
                    {"partials", &set<&Backward::partials>},
                    {"stream", &set<&Backward::stream>}});
}

void define_depthwise_conv3d(py::module_& m) {
  using Forward = DepthwiseConv3dForward;
  define<Forward>(m, "depthwise_conv3d_forward", &depthwise_conv3d_forward,
                  {{"shape", &set<&Forward::shape>},
                   {"x", &set<&Forward::x>},
                   {"x_strides", &set<&Forward::x_strides>},
                   {"weight", &set<&Forward::weight>},
                   {"bias", &set<&Forward::bias>},
                   {"position", &set<&Forward::position>},
                   {"y", &set<&Forward::y>},
                   {"stream", &set<&Forward::stream>}});
  using Backward = DepthwiseConv3dBackward;
  define<Backward>(m, "depthwise_conv3d_backward", &depthwise_conv3d_backward,
                   {{"shape", &set<&Backward::shape>},
                    {"x", &set<&Backward::x>},
                    {"x_strides", &set<&Backward::x_strides>},
                    {"weight", &set<&Backward::weight>},
                    {"position", &set<&Backward::position>},
                    {"grad_y", &set<&Backward::grad_y>},
                    {"grad_y_strides", &set<&Backward::grad_y_strides>},
                    {"grad_x", &set<&Backward::grad_x>},
                    {"accumulate", &set<&Backward::accumulate>},
                    {"grad_position", &set<&Backward::grad_position>},
                    {"position_partials", &set<&Backward::position_partials>},
                    {"grad_weight", &set<&Backward::grad_weight>},
                    {"grad_bias", &set<&Backward::grad_bias>},
                    {"weight_partials", &set<&Backward::weight_partials>},
                    {"stream", &set<&Backward::stream>}});
}

void define_token_features(py::module_& m) {
  using Forward = TokenFeaturesForward;
  define<Forward>(m, "token_features_forward", &token_features_forward,
                  {{"shape", &set<&Forward::shape>},
                   {"x", &set<&Forward::x>},
                   {"x_strides", &set<&Forward::x_strides>},
                   {"position", &set<&Forward::position>},
                   {"norm_weight", &set<&Forward::norm_weight>},
                   {"norm_bias", &set<&Forward::norm_bias>},
                   {"weight", &set<&Forward::weight>},
                   {"bias", &set<&Forward::bias>},
                   {"eps", &set<&Forward::eps>},
                   {"statistics", &set<&Forward::statistics>},
                   {"features", &set<&Forward::features>},
                   {"preactivation", &set<&Forward::preactivation>},
                   {"stream", &set<&Forward::stream>}});
  using BackwardActivation = TokenFeaturesBackwardActivation;
  define<BackwardActivation>(m, "token_features_backward_activation", &token_features_backward_activation,
                             {{"shape", &set<&BackwardActivation::shape>},
                              {"grad_features", &set<&BackwardActivation::grad_features>},
                              {"grad_features_pitch", &set<&BackwardActivation::grad_features_pitch>},
                              {"preactivation", &set<&BackwardActivation::preactivation>},
                              {"grad_preactivation", &set<&BackwardActivation::grad_preactivation>},
                              {"grad_bias", &set<&BackwardActivation::grad_bias>},
                              {"partials", &set<&BackwardActivation::partials>},
                              {"stream", &set<&BackwardActivation::stream>}});
  using Activation = TokenFeaturesActivation;
  define<Activation>(m, "token_features_activation", &token_features_activation,
                     {{"shape", &set<&Activation::shape>},
                      {"preactivation", &set<&Activation::preactivation>},
                      {"features", &set<&Activation::features>},
                      {"stream", &set<&Activation::stream>}});
  using Normalize = TokenFeaturesNormalize;
  define<Normalize>(m, "token_features_normalize", &token_features_normalize,
                    {{"shape", &set<&Normalize::shape>},
                     {"x", &set<&Normalize::x>},
                     {"x_strides", &set<&Normalize::x_strides>},
                     {"position", &set<&Normalize::position>},
                     {"norm_weight", &set<&Normalize::norm_weight>},
                     {"norm_bias", &set<&Normalize::norm_bias>},
                     {"statistics", &set<&Normalize::statistics>},
                     {"normalized", &set<&Normalize::normalized>},
                     {"stream", &set<&Normalize::stream>}});
  using BackwardNorm = TokenFeaturesBackwardNorm;
  define<BackwardNorm>(m, "token_features_backward_norm", &token_features_backward_norm,
                       {{"shape", &set<&BackwardNorm::shape>},
                        {"x", &set<&BackwardNorm::x>},
                        {"x_strides", &set<&BackwardNorm::x_strides>},
                        {"position", &set<&BackwardNorm::position>},
                        {"norm_weight", &set<&BackwardNorm::norm_weight>},
                        {"norm_bias", &set<&BackwardNorm::norm_bias>},
                        {"statistics", &set<&BackwardNorm::statistics>},
                        {"grad_normalized", &set<&BackwardNorm::grad_normalized>},
                        {"grad_x", &set<&BackwardNorm::grad_x>},
                        {"accumulate", &set<&BackwardNorm::accumulate>},
                        {"total", &set<&BackwardNorm::total>},
                        {"grad_norm_weight", &set<&BackwardNorm::grad_norm_weight>},
                        {"grad_norm_bias", &set<&BackwardNorm::grad_norm_bias>},
                        {"grad_position", &set<&BackwardNorm::grad_position>},
                        {"norm_partials", &set<&BackwardNorm::norm_partials>},
                        {"position_partials", &set<&BackwardNorm::position_partials>},
                        {"stream", &set<&BackwardNorm::stream>}});
}

void define_interpolation_head(py::module_& m) {
  using Forward = InterpolationHeadForward;
  define<Forward>(m, "interpolation_head_forward", &interpolation_head_forward,
                  {{"shape", &set<&Forward::shape>},
                   {"features", &set<&Forward::features>},
                   {"cube", &set<&Forward::cube>},
                   {"frame_bias", &set<&Forward::frame_bias>},
                   {"x", &set<&Forward::x>},
                   {"x_strides", &set<&Forward::x_strides>},
                   {"position", &set<&Forward::position>},
                   {"weight1", &set<&Forward::weight1>},
                   {"bias1", &set<&Forward::bias1>},
                   {"weight2", &set<&Forward::weight2>},
                   {"bias2", &set<&Forward::bias2>},
                   {"partials", &set<&Forward::partials>},
                   {"difference", &set<&Forward::difference>},
                   {"preactivation", &set<&Forward::preactivation>},
                   {"z", &set<&Forward::z>},
                   {"weights", &set<&Forward::weights>},
                   {"stream", &set<&Forward::stream>}});
  using Backward = InterpolationHeadBackward;
  define<Backward>(m, "interpolation_head_backward", &interpolation_head_backward,
                   {{"shape", &set<&Backward::shape>},
                    {"x", &set<&Backward::x>},
                    {"x_strides", &set<&Backward::x_strides>},
                    {"position", &set<&Backward::position>},
                    {"difference", &set<&Backward::difference>},
                    {"grad_z", &set<&Backward::grad_z>},
                    {"grad_z_strides", &set<&Backward::grad_z_strides>},
                    {"grad_weights", &set<&Backward::grad_weights>},
                    {"preactivation", &set<&Backward::preactivation>},
                    {"weight2", &set<&Backward::weight2>},
                    {"grad_x", &set<&Backward::grad_x>},
                    {"accumulate", &set<&Backward::accumulate>},
                    {"grad_position", &set<&Backward::grad_position>},
                    {"position_partials", &set<&Backward::position_partials>},
                    {"grad_difference", &set<&Backward::grad_difference>},
                    {"grad_bias2", &set<&Backward::grad_bias2>},
                    {"grad_preactivation", &set<&Backward::grad_preactivation>},
                    {"grad_frame_bias", &set<&Backward::grad_frame_bias>},
                    {"grad_bias1", &set<&Backward::grad_bias1>},
                    {"frame_partials", &set<&Backward::frame_partials>},
                    {"grad_weight2", &set<&Backward::grad_weight2>},
                    {"weight2_partials", &set<&Backward::weight2_partials>},
                    {"stream", &set<&Backward::stream>}});
  using Preactivation = InterpolationHeadPreactivation;
  define<Preactivation>(m, "interpolation_head_preactivation", &interpolation_head_preactivation,
                        {{"shape", &set<&Preactivation::shape>},
                         {"features", &set<&Preactivation::features>},
                         {"cube", &set<&Preactivation::cube>},
                         {"frame_bias", &set<&Preactivation::frame_bias>},
                         {"weight1", &set<&Preactivation::weight1>},
                         {"bias1", &set<&Preactivation::bias1>},
                         {"preactivation", &set<&Preactivation::preactivation>},
                         {"stream", &set<&Preactivation::stream>}});
}

void define_class_levels(py::module_& m) {
  using Normalize = ClassLevelsNormalize;
  define<Normalize>(m, "class_levels_normalize", &class_levels_normalize,
                    {{"shape", &set<&Normalize::shape>},
                     {"x", &set<&Normalize::x>},
                     {"x_strides", &set<&Normalize::x_strides>},
                     {"position", &set<&Normalize::position>},
                     {"preactivation", &set<&Normalize::preactivation>},
                     {"norm_weight", &set<&Normalize::norm_weight>},
                     {"norm_bias", &set<&Normalize::norm_bias>},
                     {"eps", &set<&Normalize::eps>},
                     {"normalized", &set<&Normalize::normalized>},
                     {"stream", &set<&Normalize::stream>}});
  using Context = ClassLevelsContext;
  define<Context>(m, "class_levels_context", &class_levels_context,
                  {{"shape", &set<&Context::shape>},
                   {"x", &set<&Context::x>},
                   {"x_strides", &set<&Context::x_strides>},
                   {"position", &set<&Context::position>},
                   {"pair_preactivation", &set<&Context::pair_preactivation>},
                   {"convolutions", &set<&Context::convolutions>},
                   {"workspace", &set<&Context::workspace>},
                   {"context", &set<&Context::context>},
                   {"stream", &set<&Context::stream>}});
  using BackwardContext = ClassLevelsBackwardContext;
  define<BackwardContext>(m, "class_levels_backward_context", &class_levels_backward_context,
                          {{"shape", &set<&BackwardContext::shape>},
                           {"x", &set<&BackwardContext::x>},
                           {"x_strides", &set<&BackwardContext::x_strides>},
                           {"position", &set<&BackwardContext::position>},
                           {"pair_preactivation", &set<&BackwardContext::pair_preactivation>},
                           {"convolutions", &set<&BackwardContext::convolutions>},
                           {"workspace", &set<&BackwardContext::workspace>},
                           {"grad_context", &set<&BackwardContext::grad_context>},
                           {"grad_pair_preactivation", &set<&BackwardContext::grad_pair_preactivation>},
                           {"grad_pair_bias", &set<&BackwardContext::grad_pair_bias>},
                           {"grad_x", &set<&BackwardContext::grad_x>},
                           {"grad_convolutions", &set<&BackwardContext::grad_convolutions>},
                           {"stream", &set<&BackwardContext::stream>}});
  using BackwardNorm = ClassLevelsBackwardNorm;
  define<BackwardNorm>(m, "class_levels_backward_norm", &class_levels_backward_norm,
                       {{"shape", &set<&BackwardNorm::shape>},
                        {"x", &set<&BackwardNorm::x>},
                        {"x_strides", &set<&BackwardNorm::x_strides>},
                        {"position", &set<&BackwardNorm::position>},
                        {"preactivation", &set<&BackwardNorm::preactivation>},
                        {"norm_weight", &set<&BackwardNorm::norm_weight>},
                        {"norm_bias", &set<&BackwardNorm::norm_bias>},
                        {"eps", &set<&BackwardNorm::eps>},
                        {"grad_normalized", &set<&BackwardNorm::grad_normalized>},
                        {"normalized", &set<&BackwardNorm::normalized>},
                        {"statistics", &set<&BackwardNorm::statistics>},
                        {"grad_preactivation", &set<&BackwardNorm::grad_preactivation>},
                        {"grad_x", &set<&BackwardNorm::grad_x>},
                        {"accumulate", &set<&BackwardNorm::accumulate>},
                        {"stream", &set<&BackwardNorm::stream>}});
  using BackwardSums = ClassLevelsBackwardSums;
  define<BackwardSums>(m, "class_levels_backward_sums", &class_levels_backward_sums,
                       {{"shape", &set<&BackwardSums::shape>},
                        {"x", &set<&BackwardSums::x>},
                        {"x_strides", &set<&BackwardSums::x_strides>},
                        {"position", &set<&BackwardSums::position>},
                        {"preactivation", &set<&BackwardSums::preactivation>},
                        {"statistics", &set<&BackwardSums::statistics>},
                        {"grad_normalized", &set<&BackwardSums::grad_normalized>},
                        {"grad_preactivation", &set<&BackwardSums::grad_preactivation>},
                        {"grad_norm_weight", &set<&BackwardSums::grad_norm_weight>},
                        {"grad_norm_bias", &set<&BackwardSums::grad_norm_bias>},
                        {"grad_bias", &set<&BackwardSums::grad_bias>},
                        {"stream", &set<&BackwardSums::stream>}});
}

void define_partial_sums(py::module_& m) {
  m.def(
      "partial_sums",
      [](const py::tuple& sums, const std::string& of, uintptr_t stream) {
        if (sums.size() > kMostPartialSums) throw py::value_error("partial_sums takes up to 16 sums");
        PartialSums params{};
        params.dtype = dtype(of);
        params.stream = reinterpret_cast<void*>(stream);
        for (const py::handle sum : sums) {
          const auto s = sum.cast<py::tuple>();
          if (s.size() != 10) throw py::type_error("a sum has ten members");
          PartialSum& to = params.sums[params.count++];
          convert(s[0], to.partials);
          convert(s[1], to.rows);
          convert(s[2], to.pitch);
          convert(s[3], to.columns);
          convert(s[4], to.run);
          convert(s[5], to.run_pitch);
          convert(s[6], to.to);
          to.dtype = dtype(s[7].cast<std::string>());
          convert(s[8], to.negated);
          convert(s[9], to.goes_on);
        }
        py::gil_scoped_release release;
        partial_sums(params);
      },
      "sums"_a, "dtype"_a, "stream"_a, "sums: tuples of PartialSum's members in their order, dtypes by name.");
  m.attr("MOST_PARTIAL_SUMS") = kMostPartialSums;
}

#ifdef INTI_EMULATED

py::tuple as_tuple(const inti::emulator::Widths& w) { return py::make_tuple(w.of_2, w.of_4, w.of_8, w.of_16); }
py::tuple as_tuple(const inti::emulator::SharedTraffic& s) { return py::make_tuple(s.accesses, s.ideal, s.wavefronts); }

// Sectors as the bytes of 64-bit numbers, for memoryview.cast("Q").
py::tuple as_tuple(const inti::emulator::BlockTraffic& block) {
  const auto& sectors = block.sectors;
  const std::string written(block.written.begin(), block.written.end());
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(sectors.data()), 8 * sectors.size()),
                        py::bytes(written));
}

py::list stop_recording() {
  py::list launches;
  for (const auto& launch : inti::emulator::stop_recording()) {
    py::list traffic;
    for (const auto& block : launch.traffic) traffic.append(as_tuple(block));
    launches.append(
        py::dict("kernel"_a = launch.kernel, "blocks"_a = launch.blocks, "threads"_a = launch.threads,
                 "shared_bytes"_a = launch.shared_bytes, "traffic"_a = traffic,
                 "global_loads"_a = as_tuple(launch.global_loads), "global_stores"_a = as_tuple(launch.global_stores),
                 "shared_loads"_a = as_tuple(launch.shared_loads), "shared_stores"_a = as_tuple(launch.shared_stores)));
  }
  return launches;
}

void define_emulator(py::module_& m) {
  m.def("start_recording", &inti::emulator::start_recording, "From here on every launch is counted.");
  m.def("stop_recording", &stop_recording,
        "A dict a launch. traffic: (sectors, written) of each block, in the order of first touch between two barriers, "
        "as "
        "bytes of uint64 and of bool; global_loads and _stores: accesses of 2, 4, 8 and 16 bytes; shared_loads and "
        "_stores: accesses of "
        "warps, their wavefronts without bank conflicts, and as they are.");
  m.def("set_seed", &inti::emulator::set_seed, "seed"_a, "Shuffles the order of threads.");
  m.def("set_compute_capability", &inti::emulator::set_compute_capability, "capability"_a, "70 for 7.0.");
}

#endif  // INTI_EMULATED

py::dict build_info() {
#ifdef INTI_EMULATED
  const bool emulated = true;
#else
  const bool emulated = false;
#endif
  return py::dict("version"_a = INTI_VERSION, "compiler"_a = INTI_COMPILER, "cuda_archs"_a = INTI_CUDA_ARCHS,
                  "cuda_version"_a = INTI_CUDA_VERSION, "emulated"_a = emulated);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of inti_kernels: tensors as addresses. Use inti_kernels.ops.";
  m.def("build_info", &build_info, "How this module was built.");
  m.def("code_for", &inti::code_for, "archs"_a, "capability"_a, "What the code that a GPU runs was compiled for.");
  m.def("built_for_others", &inti::built_for_others, "archs"_a, "capability"_a, "Why a GPU runs none of it.");
  define_pair_interpolate(m);
  m.def("pair_interpolate_tiles", &pair_interpolate_tiles, "batch"_a, "frames"_a, "tokens"_a);
  define_depthwise_conv3d(m);
  m.def(
      "depthwise_conv3d_tiling",
      [](const py::tuple& s) {
        const auto tiling = depthwise_conv3d_tiling(shape<DepthwiseConv3dShape>(s));
        return std::make_pair(tiling.tiles, tiling.runs);
      },
      "shape"_a, "(tiles, runs)");
  define_token_features(m);
  m.def(
      "token_features_tiles", [](const py::tuple& s) { return token_features_tiles(shape<TokenFeaturesShape>(s)); },
      "shape"_a);
  define_interpolation_head(m);
  m.def(
      "interpolation_head_partials",
      [](const py::tuple& s) { return interpolation_head_partials(shape<InterpolationHeadShape>(s)); }, "shape"_a);
  m.def(
      "interpolation_head_tiles",
      [](const py::tuple& s) { return interpolation_head_tiles(shape<InterpolationHeadShape>(s)); }, "shape"_a);
  define_class_levels(m);
  m.def(
      "class_levels_workspace", [](const py::tuple& s) { return class_levels_workspace(shape<ClassLevelsShape>(s)); },
      "shape"_a);
  define_partial_sums(m);
#ifdef INTI_EMULATED
  define_emulator(m);
#endif
}
