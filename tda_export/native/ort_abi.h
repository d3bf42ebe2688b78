// The part of ONNX Runtime's C ABI that this library uses, and the C++ example, which is compiled against it in tests;
// declared here because no package ships the header.
//
// OrtApi is a table of function pointers that only ever grows at its end, so an entry keeps its position for good; the
// positions are checked below. Every function returns null on success, except the Release* ones.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtEnv;
struct OrtIoBinding;
struct OrtRunOptions;
struct OrtSession;
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtMemoryInfo;
struct OrtTypeInfo;

struct OrtAllocator {
  uint32_t version;
  void* (*Alloc)(OrtAllocator* self, size_t bytes);
  void (*Free)(OrtAllocator* self, void* memory);
  const OrtMemoryInfo* (*Info)(const OrtAllocator* self);
};

struct OrtApi {
  OrtStatus* (*CreateStatus)(int code, const char* message);  // 0
  void* unused_1;
  const char* (*GetErrorMessage)(const OrtStatus* status);                  // 2
  OrtStatus* (*CreateEnv)(int severity, const char* log_id, OrtEnv** env);  // 3
  void* unused_4[3];
  OrtStatus* (*CreateSession)(const OrtEnv* env, const char* path, const OrtSessionOptions* options,
                              OrtSession** session);  // 7
  void* unused_8[2];
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions** options);  // 10
  void* unused_11[15];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** domain);             // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const struct OrtCustomOp* op);    // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);       // 28
  OrtStatus* (*RegisterCustomOpsLibrary)(OrtSessionOptions* options, const char* path, void** handle);  // 29
  OrtStatus* (*SessionGetInputCount)(const OrtSession* session, size_t* count);                        // 30
  OrtStatus* (*SessionGetOutputCount)(const OrtSession* session, size_t* count);                       // 31
  void* unused_32;
  OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession* session, size_t index, OrtTypeInfo** info);  // 33
  void* unused_34[15];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo* memory, void* data, size_t bytes,
                                               const int64_t* sizes, size_t count, int type,
                                               OrtValue** value);  // 49
  void* unused_50;
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);  // 51
  void* unused_52[3];
  OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo* info, const OrtTensorTypeAndShapeInfo** tensor);  // 55
  void* unused_56[4];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, int* type);              // 60
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* count);            // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count);  // 62
  void* unused_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** info);  // 65
  void* unused_66[3];
  OrtStatus* (*CreateCpuMemoryInfo)(int allocator, int memory_type, OrtMemoryInfo** memory);  // 69
  void* unused_70[8];
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator** allocator);  // 78
  void* unused_79[6];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* value);    // 85
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* value);  // 86
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name, char* text,
                                              size_t* size);                                              // 87
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext* context, size_t* count);              // 88
  void* unused_89;
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** value);  // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t count,
                                        OrtValue** value);  // 91
  void* unused_92;
  void (*ReleaseStatus)(OrtStatus* status);  // 93
  void* unused_94[2];
  void (*ReleaseValue)(OrtValue* value);  // 96
  void* unused_97;
  void (*ReleaseTypeInfo)(OrtTypeInfo* info);  // 98
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);  // 99
  void* unused_100[32];
  void (*ReleaseAllocator)(OrtAllocator* allocator);  // 132
  OrtStatus* (*RunWithBinding)(OrtSession* session, const OrtRunOptions* options, const OrtIoBinding* binding);  // 133
  OrtStatus* (*CreateIoBinding)(OrtSession* session, OrtIoBinding** binding);                                   // 134
  void* unused_135;
  OrtStatus* (*BindInput)(OrtIoBinding* binding, const char* name, const OrtValue* value);                   // 136
  OrtStatus* (*BindOutput)(OrtIoBinding* binding, const char* name, const OrtValue* value);                  // 137
  OrtStatus* (*BindOutputToDevice)(OrtIoBinding* binding, const char* name, const OrtMemoryInfo* memory);  // 138
  void* unused_139;
  OrtStatus* (*GetBoundOutputValues)(const OrtIoBinding* binding, OrtAllocator* allocator, OrtValue*** values,
                                     size_t* count);  // 140
  void* unused_141[52];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** stream);  // 193
  void* unused_194[55];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** value);  // 249
  void* unused_250[15];
  OrtStatus* (*KernelContext_GetResource)(const OrtKernelContext* context, int version, int resource,
                                          void** out);  // 265
  void* unused_266[8];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*work)(void* user, size_t task),
                                          size_t tasks, size_t batches, void* user);  // 274
  void* unused_275[2];
  OrtStatus* (*KernelContext_GetScratchBuffer)(const OrtKernelContext* context, const OrtMemoryInfo* memory,
                                               size_t bytes, void** buffer);                              // 277
  OrtStatus* (*KernelInfoGetAllocator)(const OrtKernelInfo* info, int memory_type, OrtAllocator** out);  // 278
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// An operator's description. With version 16 ONNX Runtime reads no field after KernelComputeV2.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);  // null is the CPU
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);  // 0 required, 1 optional, 2 variadic
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);  // 0 is the provider's own memory
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  void* later_versions[7];
};

}  // extern "C"

namespace tda {

constexpr uint32_t kOrtApiVersion = 16;
constexpr const char* kCudaProvider = "CUDAExecutionProvider";

// ONNX Runtime's error codes.
constexpr int kOrtFail = 1;

constexpr int kHostMemory = -2;  // OrtMemTypeCPUInput
constexpr int kVariadic = 2;     // a characteristic of an input or output

// ONNX element types.
enum ElementType : int {
  kAnyType = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kBool = 9,
  kHalf = 10,
  kBfloat16 = 16
};

#define TDA_CHECK_SLOT(function, slot) \
  static_assert(offsetof(OrtApi, function) == (slot) * sizeof(void*), #function " is not where the ABI has it")
TDA_CHECK_SLOT(GetErrorMessage, 2);
TDA_CHECK_SLOT(CreateSession, 7);
TDA_CHECK_SLOT(CreateCustomOpDomain, 26);
TDA_CHECK_SLOT(AddCustomOpDomain, 28);
TDA_CHECK_SLOT(SessionGetInputTypeInfo, 33);
TDA_CHECK_SLOT(CreateTensorWithDataAsOrtValue, 49);
TDA_CHECK_SLOT(GetTensorMutableData, 51);
TDA_CHECK_SLOT(GetTensorElementType, 60);
TDA_CHECK_SLOT(GetTensorTypeAndShape, 65);
TDA_CHECK_SLOT(CreateCpuMemoryInfo, 69);
TDA_CHECK_SLOT(GetAllocatorWithDefaultOptions, 78);
TDA_CHECK_SLOT(KernelInfoGetAttribute_float, 85);
TDA_CHECK_SLOT(KernelInfoGetAttribute_int64, 86);
TDA_CHECK_SLOT(KernelContext_GetInput, 90);
TDA_CHECK_SLOT(ReleaseStatus, 93);
TDA_CHECK_SLOT(ReleaseValue, 96);
TDA_CHECK_SLOT(ReleaseTensorTypeAndShapeInfo, 99);
TDA_CHECK_SLOT(ReleaseAllocator, 132);
TDA_CHECK_SLOT(GetBoundOutputValues, 140);
TDA_CHECK_SLOT(KernelContext_GetGPUComputeStream, 193);
TDA_CHECK_SLOT(KernelInfoGetConstantInput_tensor, 249);
TDA_CHECK_SLOT(KernelContext_GetResource, 265);
TDA_CHECK_SLOT(KernelContext_ParallelFor, 274);
TDA_CHECK_SLOT(KernelContext_GetScratchBuffer, 277);
TDA_CHECK_SLOT(KernelInfoGetAllocator, 278);
#undef TDA_CHECK_SLOT

static_assert(offsetof(OrtCustomOp, KernelCompute) == 8 * sizeof(void*), "OrtCustomOp has another layout");
static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 17 * sizeof(void*), "OrtCustomOp has another layout");

}  // namespace tda
