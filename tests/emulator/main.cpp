// Runs every case, or those named, and prints for each a line: name, "ok", "caught" (the emulator found an error in a
// kernel) or "failed" (the emulator itself is wrong), and the message; separated by tabs.
#include <cstdio>
#include <cstring>

#include "harness.h"

int main(int count, char** names) {
  for (const auto& test : testing::cases()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(names[i], test.name) == 0;
    if (!wanted) continue;
    std::string end = "ok\t";
    try {
      test.run();
    } catch (const inti::emulator::Error& error) {
      end = std::string("caught\t") + error.what();
    } catch (const std::exception& error) {
      end = std::string("failed\t") + error.what();
    }
    std::printf("%s\t%s\n", test.name, end.c_str());
    std::fflush(stdout);
  }
}
