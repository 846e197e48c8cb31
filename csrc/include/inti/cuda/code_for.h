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

}  // namespace inti
