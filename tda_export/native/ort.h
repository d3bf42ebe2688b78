// Thin C++ over ONNX Runtime's C ABI: tensors, scratch memory, errors. Throws Error; op.cc turns that into a status.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace tda {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throw an Error whose text is the parts, one after another.
template <class... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

// Throw a status's message, if it is an error.
void Check(const OrtApi* api, OrtStatus* status);

// A tensor of a kernel call, in the memory of the kernel's provider.
struct Tensor {
  static constexpr size_t kMaxRank = 8;

  bool present = false;  // false where an optional input was left out
  void* data = nullptr;  // an empty tensor may have none
  int type = 0;          // of an input
  size_t rank = 0;
  int64_t sizes[kMaxRank] = {};

  int64_t Count() const;
  std::string Shape() const;  // such as [1, 2, 576]

  template <class T>
  T* As() const {
    return static_cast<T*>(data);
  }
};

// What a kernel is made from: a node of ONNX Runtime's graph, or one inside of such a node (subgraph_cpu.cc).
class KernelInfo {
 public:
  KernelInfo(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  virtual ~KernelInfo() = default;
  KernelInfo(const KernelInfo&) = delete;
  KernelInfo& operator=(const KernelInfo&) = delete;

  virtual int64_t Int(const char* attribute) const;
  virtual bool Flag(const char* attribute) const;  // false where the node does not have it
  virtual float Float(const char* attribute) const;
  virtual std::string String(const char* attribute) const;
  // The values of an input that has the same in every call, in the provider's memory; not present where they may differ.
  virtual Tensor Constant(size_t input) const;
  bool IsConstant(size_t input) const { return Constant(input).present; }
  const OrtApi* api() const { return api_; }
  const OrtKernelInfo* get() const { return info_; }

 private:
  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// The allocator of the kernel's provider: an arena of ONNX Runtime's, which reuses memory.
class Allocator {
 public:
  explicit Allocator(const KernelInfo& info);
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  OrtAllocator* get() const { return allocator_; }

 private:
  const OrtApi* api_;
  OrtAllocator* allocator_ = nullptr;
};

// One call of a kernel.
class KernelContext {
 public:
  // `constants`: the inputs that have the same values in every call; others are not present there.
  KernelContext(const OrtApi* api, OrtKernelContext* context, const std::vector<Tensor>& constants)
      : api_(api), context_(context), constants_(constants) {}
  virtual ~KernelContext() = default;
  KernelContext(const KernelContext&) = delete;
  KernelContext& operator=(const KernelContext&) = delete;

  // Return an input. It is not present where an optional input was left out.
  virtual Tensor Input(size_t index) const;
  Tensor Output(size_t index, std::initializer_list<int64_t> sizes) const;
  Tensor OutputLike(size_t index, const Tensor& other) const;
  void* CudaStream() const;
  void* CublasHandle() const;  // of the provider, bound to the stream

  // Call work(task) for every task in [0, tasks) on ONNX Runtime's own thread pool, whose threads take one task after
  // another.
  template <class Work>
  void ParallelFor(size_t tasks, const Work& work) const {
    Distribute(tasks, [](void* user, size_t task) { (*static_cast<const Work*>(user))(task); }, const_cast<Work*>(&work));
  }

  // Return about how many threads take tasks; it may only decide how work is cut.
  virtual int64_t Threads() const;

  // Return memory that is the call's own, on the CPU, other memory each time, until the kernel returns; or null if the
  // provider's allocator has to be asked for it. Only for the thread that runs the kernel.
  virtual void* OwnMemory(size_t) const { return nullptr; }

  const OrtApi* api() const { return api_; }
  OrtKernelContext* get() const { return context_; }

 protected:
  using TaskOf = void (*)(void* user, size_t task);

  virtual Tensor Allocate(size_t index, const int64_t* sizes, size_t rank) const;
  virtual void Distribute(size_t tasks, TaskOf work, void* user) const;

 private:
  const OrtApi* api_;
  OrtKernelContext* context_;
  const std::vector<Tensor>& constants_;
};

// Memory for one call, the context's own or of the provider's arena, to which it is returned at the end of the call. On
// CUDA the arena hands it out again only to later work of the same stream, so that concurrent calls share nothing.
class Scratch {
 public:
  Scratch(const KernelContext& context, const Allocator& allocator, size_t bytes, bool cuda);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* As(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_) + byte_offset);
  }

 private:
  OrtAllocator* allocator_ = nullptr;  // null where the memory is the context's
  void* memory_;
};

}  // namespace tda
