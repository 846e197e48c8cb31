// How Python names a dtype; for both modules' bindings.
#pragma once

#include <stdexcept>
#include <string>

#include "inti/types.h"

inline inti::DType dtype(const std::string& name) {
  if (name == "float32") return inti::DType::float32;
  if (name == "float64") return inti::DType::float64;
  if (name == "bfloat16") return inti::DType::bfloat16;
  if (name == "float16") return inti::DType::float16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " + name);
}
