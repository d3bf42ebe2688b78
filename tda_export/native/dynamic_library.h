// Shared libraries opened at run time, so that this library loads on hosts that have none of them.
#pragma once

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif

#include <cstddef>
#include <string>
#include <utility>

namespace tda {

class DynamicLibrary {
 public:
  // Open the first of `names` that can be opened. The library stays loaded.
  template <size_t kCount>
  explicit DynamicLibrary(const char* const (&names)[kCount]) {
    for (size_t i = 0; i < kCount && handle_ == nullptr; ++i) Open(names[i]);
  }

  // Return the library that someone in this process has opened from a file of this name, wherever it lies.
  static DynamicLibrary Opened(const std::string& file) {
    std::string path;
#ifdef __linux__
    const std::string end = "/" + file;
    std::pair<const std::string&, std::string&> search{end, path};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          auto& [name_end, found] = *static_cast<decltype(search)*>(data);
          const std::string name = info->dlpi_name;
          if (name.size() < name_end.size()) return 0;
          if (name.compare(name.size() - name_end.size(), name_end.size(), name_end) != 0) return 0;
          found = name;
          return 1;
        },
        &search);
#endif
    DynamicLibrary library;
    if (!path.empty()) library.Open(path.c_str());
    return library;
  }

  bool loaded() const { return handle_ != nullptr; }
  const std::string& problem() const { return problem_; }  // of the first name that could not be opened

  // Set `function` to a symbol's address in the library or in those that it was linked with, or null where there is none.
  template <class Function>
  void Find(const char* symbol, Function*& function) const {
    function = reinterpret_cast<Function*>(dlsym(handle_, symbol));
  }

 private:
  DynamicLibrary() = default;

  void Open(const char* name) {
    handle_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr && problem_.empty()) problem_ = dlerror();
  }

  void* handle_ = nullptr;
  std::string problem_;
};

}  // namespace tda
