// Compiles device code without a GPU, so that machines without one can check that it compiles.
#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "cuda_module.h"
#include "nvrtc.h"

// Compile device/<name>.cu for a compute capability such as 90, with defines separated by spaces. Returns an empty text
// or the error; the text is valid until the calling thread's next call.
extern "C" __attribute__((visibility("default"))) const char* TdaCompileCheck(const char* name, const char* defines,
                                                                              int capability) {
  thread_local std::string problem;
  problem.clear();
  try {
    std::vector<std::string> separate;
    const std::string all = defines;
    for (size_t start = 0; start < all.size();) {
      const size_t end = std::min(all.find(' ', start), all.size());
      separate.push_back(all.substr(start, end - start));
      start = end + 1;
    }
    if (tda::CompileDeviceCode(name, tda::DeviceSource(name), separate, capability).empty()) problem = "no code";
  } catch (const std::exception& error) {
    problem = error.what();
  }
  return problem.c_str();
}
