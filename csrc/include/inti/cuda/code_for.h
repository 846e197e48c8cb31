#pragma once

#include <string>

namespace inti {

// What the code that a GPU runs was compiled for: "70;75+PTX" has machine code of 7.0 and 7.5, which later GPUs of the
// same major version run, and PTX of 7.5, which is compiled for any later one. The least there is if nothing is known.
inline int code_for(const std::string& archs, int capability) {
  int best = 70;
  for (size_t at = 0; at < archs.size();) {
    const size_t end = archs.find(';', at) == std::string::npos ? archs.size() : archs.find(';', at);
    const std::string arch = archs.substr(at, end - at);
    const int number = std::stoi(arch);
    const bool runs = number / 10 == capability / 10 || arch.find("PTX") != std::string::npos;
    if (number <= capability && runs && number > best) best = number;
    at = end + 1;
  }
  return best;
}

// Why a GPU runs nothing of what was compiled, and what to do: the sentence of backends/cuda/__init__.py, for a launch
// that finds it out.
inline std::string built_for_others(const std::string& archs, int capability) {
  std::string built;
  for (const char c : archs) built += c == ';' ? ", " : std::string(1, c);
  const std::string major = std::to_string(capability / 10), minor = std::to_string(capability % 10);
  return "the CUDA kernels were built for " + (built.empty() ? "GPUs that nobody noted" : built) +
         ", and this GPU has compute capability " + major + "." + minor + ": rebuild with INTI_CUDA_ARCHS=" + major +
         minor + ".";
}

}  // namespace inti
