#include "ort.h"

#include <algorithm>
#include <thread>

namespace tda {
namespace {

Tensor Describe(const OrtApi* api, OrtValue* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  tensor.present = true;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api, api->GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api->GetTensorElementType(info, &tensor.type);
  if (status == nullptr) status = api->GetDimensionsCount(info, &tensor.rank);
  const bool too_many = status == nullptr && tensor.rank > Tensor::kMaxRank;
  if (status == nullptr && !too_many) status = api->GetDimensions(info, tensor.sizes, tensor.rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  Check(api, status);
  if (too_many) Fail("a tensor of ", tensor.rank, " axes; at most ", Tensor::kMaxRank, " are expected");
  Check(api, api->GetTensorMutableData(value, &tensor.data));
  return tensor;
}

}  // namespace

void Check(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw Error(message);
}

int64_t Tensor::Count() const {
  int64_t count = 1;
  for (size_t axis = 0; axis < rank; ++axis) count *= sizes[axis];
  return count;
}

std::string Tensor::Shape() const {
  std::ostringstream text;
  text << '[';
  for (size_t axis = 0; axis < rank; ++axis) text << (axis ? ", " : "") << sizes[axis];
  text << ']';
  return text.str();
}

int64_t KernelInfo::Int(const char* attribute) const {
  int64_t value = 0;
  Check(api_, api_->KernelInfoGetAttribute_int64(info_, attribute, &value));
  return value;
}

bool KernelInfo::Flag(const char* attribute) const {
  int64_t value = 0;
  OrtStatus* missing = api_->KernelInfoGetAttribute_int64(info_, attribute, &value);
  if (missing == nullptr) return value != 0;
  api_->ReleaseStatus(missing);
  return false;
}

float KernelInfo::Float(const char* attribute) const {
  float value = 0;
  Check(api_, api_->KernelInfoGetAttribute_float(info_, attribute, &value));
  return value;
}

std::string KernelInfo::String(const char* attribute) const {
  size_t size = 0;  // with the terminating zero
  Check(api_, api_->KernelInfoGetAttribute_string(info_, attribute, nullptr, &size));
  std::string value(size, '\0');
  Check(api_, api_->KernelInfoGetAttribute_string(info_, attribute, value.data(), &size));
  value.resize(size - 1);
  return value;
}

Tensor KernelInfo::Constant(size_t input) const {
  int constant = 0;
  const OrtValue* value = nullptr;
  Check(api_, api_->KernelInfoGetConstantInput_tensor(info_, input, &constant, &value));
  return constant != 0 ? Describe(api_, const_cast<OrtValue*>(value)) : Tensor();
}

Allocator::Allocator(const KernelInfo& info) : api_(info.api()) {
  Check(api_, api_->KernelInfoGetAllocator(info.get(), 0, &allocator_));
}

Allocator::~Allocator() { api_->ReleaseAllocator(allocator_); }

Tensor KernelContext::Input(size_t index) const {
  if (index < constants_.size() && constants_[index].present) return constants_[index];
  size_t count = 0;
  Check(api_, api_->KernelContext_GetInputCount(context_, &count));
  if (index >= count) return Tensor();
  const OrtValue* value = nullptr;
  Check(api_, api_->KernelContext_GetInput(context_, index, &value));
  return Describe(api_, const_cast<OrtValue*>(value));
}

Tensor KernelContext::Output(size_t index, std::initializer_list<int64_t> sizes) const {
  return Allocate(index, sizes.begin(), sizes.size());
}

Tensor KernelContext::OutputLike(size_t index, const Tensor& other) const {
  return Allocate(index, other.sizes, other.rank);
}

void* KernelContext::CudaStream() const {
  void* stream = nullptr;
  Check(api_, api_->KernelContext_GetGPUComputeStream(context_, &stream));
  return stream;
}

void* KernelContext::CublasHandle() const {
  constexpr int kResourceVersion = 1, kCublasHandle = 10002;  // onnxruntime/core/providers/cuda/cuda_resource.h
  void* handle = nullptr;
  Check(api_, api_->KernelContext_GetResource(context_, kResourceVersion, kCublasHandle, &handle));
  return handle;
}

Tensor KernelContext::Allocate(size_t index, const int64_t* sizes, size_t rank) const {
  OrtValue* value = nullptr;
  Check(api_, api_->KernelContext_GetOutput(context_, index, sizes, rank, &value));
  if (value == nullptr) Fail("the node has no output ", index);
  Tensor tensor;
  tensor.present = true;
  tensor.rank = rank;
  std::copy_n(sizes, rank, tensor.sizes);
  Check(api_, api_->GetTensorMutableData(value, &tensor.data));
  return tensor;
}

int64_t KernelContext::Threads() const {
  static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  return processors;
}

// Without a number of batches, each thread would get a fixed share beforehand.
void KernelContext::Distribute(size_t tasks, TaskOf work, void* user) const {
  Check(api_, api_->KernelContext_ParallelFor(context_, work, tasks, tasks, user));
}

Scratch::Scratch(const KernelContext& context, const Allocator& allocator, size_t bytes, bool cuda)
    : memory_(cuda ? nullptr : context.OwnMemory(bytes)) {
  if (memory_ != nullptr) return;
  allocator_ = allocator.get();
  if (cuda) {
    const OrtMemoryInfo* memory = allocator_->Info(allocator_);
    Check(context.api(), context.api()->KernelContext_GetScratchBuffer(context.get(), memory, bytes, &memory_));
  } else {
    memory_ = allocator_->Alloc(allocator_, bytes);
  }
  if (memory_ == nullptr) Fail("no memory for ", bytes, " bytes of scratch space");
}

Scratch::~Scratch() {
  if (allocator_ != nullptr) allocator_->Free(allocator_, memory_);
}

}  // namespace tda
