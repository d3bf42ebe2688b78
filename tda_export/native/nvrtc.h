// Device code from source, by NVRTC, which ONNX Runtime's CUDA wheel brings.
#pragma once

#include <string>
#include <vector>

namespace tda {

// Compile CUDA source for a GPU.
//
// `capability` is the GPU's, such as 90. A GPU newer than this NVRTC gets PTX of the newest one it knows, which the
// driver compiles. Throws NVRTC's error with its log.
std::string CompileDeviceCode(const std::string& name, const std::string& source,
                              const std::vector<std::string>& defines, int capability);

}  // namespace tda
