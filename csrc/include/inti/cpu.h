// The CPU kernels, one table an instruction set; the table in use is chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "inti/class_levels.h"
#include "inti/depthwise_conv3d.h"
#include "inti/few_rows.h"
#include "inti/interpolation_head.h"
#include "inti/pair_interpolate.h"
#include "inti/product.h"
#include "inti/token_blocks.h"
#include "inti/token_features.h"

namespace inti {

struct CpuKernels {
  void (*pair_interpolate_forward)(const PairInterpolateForward&);
  void (*pair_interpolate_backward)(const PairInterpolateBackward&);
  void (*depthwise_conv3d_forward)(const DepthwiseConv3dForward&);
  void (*depthwise_conv3d_backward)(const DepthwiseConv3dBackward&);
  void (*token_features_normalize)(const TokenFeaturesNormalize&);
  void (*token_features_activation)(const TokenFeaturesActivation&);
  void (*token_features_forward)(const TokenFeaturesForward&);
  void (*token_features_activation_backward)(const TokenFeaturesActivationBackward&);
  void (*token_features_norm_backward)(const TokenFeaturesNormBackward&);
  void (*interpolation_head_forward)(const InterpolationHeadForward&);
  void (*interpolation_head_network)(const InterpolationHeadNetwork&);
  void (*interpolation_head_backward)(const InterpolationHeadBackward&);
  void (*few_rows_forward)(const FewRowsForward&);
  void (*few_rows_backward)(const FewRowsBackward&);
  void (*class_levels_forward)(const ClassLevelsForward&);
  void (*class_levels_backward)(const ClassLevelsBackward&);
  void (*partial_sums)(const PartialSums&);
  void (*product)(const Product&);
};

// Built and supported by this processor, slowest first.
std::vector<std::string> cpu_isas();

// The one in use: what set_cpu_isa chose, else the environment's INTI_CPU, else the last of cpu_isas().
std::string cpu_isa();

// Throws std::invalid_argument for a name that isn't in cpu_isas().
void set_cpu_isa(const std::string& name);

const CpuKernels& cpu_kernels();

}  // namespace inti
