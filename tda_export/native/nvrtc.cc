#include "nvrtc.h"

#include <algorithm>

#include "dynamic_library.h"
#include "ort.h"

namespace tda {
namespace {

struct NvrtcProgramOpaque;
using NvrtcProgram = NvrtcProgramOpaque*;

struct Nvrtc {
  static const Nvrtc& Get() {
    static const Nvrtc nvrtc;
    return nvrtc;
  }

  void Check(int result, const char* what) const {
    if (result != 0) Fail("NVRTC could not ", what, " (", GetErrorString(result), ")");
  }

  const char* (*GetErrorString)(int result);
  int (*GetNumSupportedArchs)(int* count);
  int (*GetSupportedArchs)(int* capabilities);
  int (*CreateProgram)(NvrtcProgram* program, const char* source, const char* name, int headers,
                       const char* const* contents, const char* const* names);
  int (*CompileProgram)(NvrtcProgram program, int count, const char* const* options);
  int (*GetProgramLogSize)(NvrtcProgram program, size_t* size);
  int (*GetProgramLog)(NvrtcProgram program, char* log);
  int (*GetCUBINSize)(NvrtcProgram program, size_t* size);
  int (*GetCUBIN)(NvrtcProgram program, char* code);
  int (*GetPTXSize)(NvrtcProgram program, size_t* size);
  int (*GetPTX)(NvrtcProgram program, char* code);
  int (*DestroyProgram)(NvrtcProgram* program);
  int (*Version)(int* major, int* minor);

 private:
  Nvrtc() {
    static const DynamicLibrary library({"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"});
    if (!library.loaded()) {
      Fail("NVRTC, which compiles the kernels for this GPU, cannot be opened (", library.problem(),
           "). Install it with 'pip install tda-export[cuda]'");
    }
    const char* missing = nullptr;
    auto find = [&](const char* symbol, auto*& function) {
      library.Find(symbol, function);
      if (function == nullptr && missing == nullptr) missing = symbol;
    };
    find("nvrtcGetErrorString", GetErrorString);
    find("nvrtcGetNumSupportedArchs", GetNumSupportedArchs);
    find("nvrtcGetSupportedArchs", GetSupportedArchs);
    find("nvrtcCreateProgram", CreateProgram);
    find("nvrtcCompileProgram", CompileProgram);
    find("nvrtcGetProgramLogSize", GetProgramLogSize);
    find("nvrtcGetProgramLog", GetProgramLog);
    find("nvrtcGetCUBINSize", GetCUBINSize);
    find("nvrtcGetCUBIN", GetCUBIN);
    find("nvrtcGetPTXSize", GetPTXSize);
    find("nvrtcGetPTX", GetPTX);
    find("nvrtcDestroyProgram", DestroyProgram);
    find("nvrtcVersion", Version);
    if (missing != nullptr) Fail("NVRTC has no ", missing, "; install the one of CUDA 12 or newer");
    OpenBuiltins();
  }

  // NVRTC opens its library of built-in declarations by name alone, which fails where its folder is not on the search
  // path, as with Python wheels. Once opened by its path it is found.
  void OpenBuiltins() const {
    int major = 0, minor = 0;
    Dl_info self;
    Check(Version(&major, &minor), "tell its version");
    if (dladdr(reinterpret_cast<const void*>(Version), &self) == 0) return;
    const std::string path = self.dli_fname;
    const std::string name = "libnvrtc-builtins.so." + std::to_string(major) + "." + std::to_string(minor);
    const std::string beside = path.substr(0, path.rfind('/') + 1) + name;
    const char* const names[] = {beside.c_str()};
    const DynamicLibrary builtins(names);  // where it is not there, NVRTC looks for it and says so
  }
};

// A program that is destroyed on every exit.
class Program {
 public:
  Program(const std::string& name, const std::string& source) {
    nvrtc_.Check(nvrtc_.CreateProgram(&program_, source.c_str(), name.c_str(), 0, nullptr, nullptr), "read the source");
  }
  ~Program() { nvrtc_.DestroyProgram(&program_); }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void Compile(const std::vector<std::string>& options) {
    std::vector<const char*> pointers;
    for (const std::string& option : options) pointers.push_back(option.c_str());
    const int result = nvrtc_.CompileProgram(program_, static_cast<int>(pointers.size()), pointers.data());
    if (result == 0) return;
    size_t size = 0;
    std::string log;
    if (nvrtc_.GetProgramLogSize(program_, &size) == 0 && size > 1) {
      log.resize(size);
      if (nvrtc_.GetProgramLog(program_, log.data()) != 0) log.clear();
      log.resize(log.find('\0') == std::string::npos ? log.size() : log.find('\0'));
    }
    Fail("NVRTC could not compile the kernels (", nvrtc_.GetErrorString(result), "): ", log);
  }

  std::string Code(bool ptx) {
    size_t size = 0;
    nvrtc_.Check(ptx ? nvrtc_.GetPTXSize(program_, &size) : nvrtc_.GetCUBINSize(program_, &size), "give its result");
    std::string code(size, '\0');
    nvrtc_.Check(ptx ? nvrtc_.GetPTX(program_, code.data()) : nvrtc_.GetCUBIN(program_, code.data()),
                 "give its result");
    return code;
  }

 private:
  const Nvrtc& nvrtc_ = Nvrtc::Get();
  NvrtcProgram program_ = nullptr;
};

}  // namespace

std::string CompileDeviceCode(const std::string& name, const std::string& source,
                              const std::vector<std::string>& defines, int capability) {
  const Nvrtc& nvrtc = Nvrtc::Get();
  int count = 0;
  nvrtc.Check(nvrtc.GetNumSupportedArchs(&count), "list its GPUs");
  std::vector<int> known(count);
  nvrtc.Check(nvrtc.GetSupportedArchs(known.data()), "list its GPUs");
  int newest = 0;
  for (int each : known) {
    if (each <= capability) newest = std::max(newest, each);
  }
  if (newest == 0) Fail("this NVRTC compiles for no GPU as old as compute capability ", capability / 10.0);
  const bool ptx = newest != capability;
  std::vector<std::string> options = {(ptx ? "--gpu-architecture=compute_" : "--gpu-architecture=sm_") +
                                          std::to_string(newest),
                                      "--std=c++17"};
  for (const std::string& define : defines) options.push_back("-D" + define);
  Program program(name, source);
  program.Compile(options);
  return program.Code(ptx);
}

}  // namespace tda
