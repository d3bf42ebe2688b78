#include "kernel_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace tda {
namespace {

constexpr size_t kHashDigits = 16;

// A file descriptor that is closed on every exit.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int get() const { return descriptor_; }
  bool open() const { return descriptor_ >= 0; }

 private:
  int descriptor_;
};

// The same place as models/builtin.py's.
std::string CacheFolder() {
  if (const char* configured = std::getenv("TDA_EXPORT_CACHE"); configured != nullptr && *configured) return configured;
  if (const char* base = std::getenv("XDG_CACHE_HOME"); base != nullptr && *base) return std::string(base) + "/tda-export";
  if (const char* home = std::getenv("HOME"); home != nullptr && *home) return std::string(home) + "/.cache/tda-export";
  return "";
}

bool MakeFolders(const std::string& path) {
  for (size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
    const std::string part = path.substr(0, slash);
    struct stat found;
    if (stat(part.c_str(), &found) != 0 && mkdir(part.c_str(), 0700) != 0 && errno != EEXIST) return false;
    if (slash == std::string::npos) return true;
  }
}

// Return the folder of compiled code, or nothing unless it belongs to this user and nobody else may write to it, since
// its content runs on the GPU.
std::string PrivateFolder() {
  const std::string base = CacheFolder();
  if (base.empty()) return "";
  const std::string folder = base + "/kernels";
  struct stat found;
  if (!MakeFolders(folder) || lstat(folder.c_str(), &found) != 0) return "";
  const bool own = S_ISDIR(found.st_mode) && found.st_uid == geteuid() && (found.st_mode & (S_IWGRP | S_IWOTH)) == 0;
  return own ? folder : "";
}

std::string ReadAll(int descriptor) {
  std::string content;
  char block[1 << 16];
  for (ssize_t size; (size = read(descriptor, block, sizeof(block))) > 0;) content.append(block, size);
  return content;
}

bool WriteAll(int descriptor, const std::string& content) {
  size_t written = 0;
  while (written < content.size()) {
    const ssize_t size = write(descriptor, content.data() + written, content.size() - written);
    if (size <= 0) return false;
    written += size;
  }
  return true;
}

}  // namespace

std::string TextHash(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const unsigned char byte : text) hash = (hash ^ byte) * 0x100000001b3u;
  char digits[kHashDigits + 1];
  std::snprintf(digits, sizeof(digits), "%016llx", static_cast<unsigned long long>(hash));
  return digits;
}

std::string LoadCachedCode(const std::string& name) {
  const std::string folder = PrivateFolder();
  if (folder.empty()) return "";
  const File file(open((folder + "/" + name).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  if (!file.open()) return "";
  const std::string content = ReadAll(file.get());  // the code, then its hash
  if (content.size() <= kHashDigits) return "";
  const std::string code = content.substr(0, content.size() - kHashDigits);
  return TextHash(code) == content.substr(code.size()) ? code : "";
}

void StoreCachedCode(const std::string& name, const std::string& code) {
  const std::string folder = PrivateFolder();
  if (folder.empty()) return;
  std::string part = folder + "/." + name + ".XXXXXX";
  bool complete = false;
  {
    const File file(mkstemp(part.data()));  // readable and writable by this user alone
    if (!file.open()) return;
    complete = WriteAll(file.get(), code + TextHash(code)) && fsync(file.get()) == 0;
  }
  if (!complete || rename(part.c_str(), (folder + "/" + name).c_str()) != 0) unlink(part.c_str());
}

}  // namespace tda
