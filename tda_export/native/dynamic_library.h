// Shared libraries opened at run time, so that this library loads on hosts that have none of them.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <string>

namespace tda {

class DynamicLibrary {
 public:
  // Open the first of `names` that can be opened. The library stays loaded.
  template <size_t kCount>
  explicit DynamicLibrary(const char* const (&names)[kCount]) {
    for (size_t i = 0; i < kCount && handle_ == nullptr; ++i) Open(names[i]);
  }

  bool loaded() const { return handle_ != nullptr; }
  const std::string& problem() const { return problem_; }  // of the first name that could not be opened

  // Set `function` to a symbol's address, or null where the library has none.
  template <class Function>
  void Find(const char* symbol, Function*& function) const {
    function = reinterpret_cast<Function*>(dlsym(handle_, symbol));
  }

 private:
  void Open(const char* name) {
    handle_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr && problem_.empty()) problem_ = dlerror();
  }

  void* handle_ = nullptr;
  std::string problem_;
};

}  // namespace tda
